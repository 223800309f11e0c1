"""What the ranks of a recipe's stages will hand over, and how long stages take with it, as `lbllm validate` shows it."""

from itertools import product
from typing import Any

from rich.console import Console
from rich.table import Table

from lbllm_cli.cli.durations import span
from lbllm_cli.cli.forecasts import print_table
from lbllm_cli.core.errors import UsageError
from lbllm_cli.pipeline.forecast import Need
from lbllm_cli.pipeline.plan import Plan
from lbllm_cli.pipeline.ranks import check_shares
from lbllm_cli.pipeline.traffic import ALL_REDUCE, BROADCAST, GATHER, OWNERS, REDUCE, stage_seconds
from lbllm_cli.pipeline.work import work_of
from lbllm_cli.runtime.cards import CARDS
from lbllm_cli.runtime.links import BETWEEN, FAST, INSIDE, NVLINK, Link

_KINDS = (REDUCE, BROADCAST, ALL_REDUCE, OWNERS, GATHER)
_COMPUTING = "computing"
_MB = 1e6


def share_problems(plan: Plan) -> list[str]:
    """What the stages of a recipe would say of too few sequences for the ranks of a plan."""
    found = []
    for spec in plan.recipe.stages:
        try:
            check_shares(plan, spec, plan.shape(spec)[0])
        except UsageError as error:
            found.append(str(error))
    return found


class Exchanges:
    """Of a plan for several ranks: bytes, and seconds on an H100 by the links that there may be."""

    def __init__(self, plan: Plan, needs: list[Need]):
        self.world, self.card = plan.world, CARDS["h100"]
        stages = sorted(plan.recipe.stages, key=lambda spec: spec.end_to_end)
        self.exchanged = {spec.name: work_of(spec).exchanged(plan, spec) for spec in stages}
        self.parts = {spec.name: work_of(spec).work(plan, spec) for spec in stages}
        self.places = {need.stage: need.place for need in needs}
        # Of one machine nothing is between.
        self.pairs = list(product(INSIDE, BETWEEN if self.world.machines > 1 else (FAST,)))

    def _title(self, pair: tuple[Link, Link]) -> str:
        names = [link.name for link in pair] if self.world.machines > 1 else [pair[0].name]
        return f"{self.card.name}, {', '.join(names)}"

    def _terms(self, stage: str, pair: tuple[Link, Link]) -> dict[str, float]:
        return stage_seconds(self.parts[stage], self.exchanged[stage], self.world, self.card, self.places[stage], pair)

    def seconds(self) -> dict[str, dict[str, int]]:
        """By stage, and by card and links."""
        return {
            stage: {self._title(pair): round(sum(self._terms(stage, pair).values())) for pair in self.pairs}
            for stage in self.exchanged
        }

    def busy(self, stage: str) -> dict[str, float]:
        """Seconds of a stage in which a rank computes, and in which each link is busy; some of it at the same time."""
        exchanged, world = self.exchanged[stage], self.world
        found = {_COMPUTING: sum(part.seconds(self.card, self.places[stage]) for part in self.parts[stage])}
        found |= {link.name: exchanged.inside(world, link) for link in INSIDE} if world.node > 1 else {}
        return found | ({link.name: exchanged.between(world, link) for link in BETWEEN} if world.machines > 1 else {})

    def bottleneck(self, stage: str, pair: tuple[Link, Link]) -> str:
        """What is busy longest in a stage: computing, or a link."""
        names = [_COMPUTING, *(link.name for link in pair)]
        busy = {name: seconds for name, seconds in self.busy(stage).items() if name in names}
        return max(busy, key=lambda name: busy[name])

    def facts(self) -> dict[str, Any]:
        """For JSON: seconds; bytes by kind, what holds a stage up."""
        return {"forecast_seconds": self.seconds(), "ranks": self._ranks()}

    def _ranks(self) -> dict[str, Any]:
        return {
            "world_size": self.world.size,
            "per_node": self.world.node,
            "machines": self.world.machines,
            "disk_is_of": "output.dir, which all ranks share: streams, training states and checkpoints of all of them",
            "stages": {
                stage: {
                    "steps_per_block" if exchanged.blocks > 1 else "steps": exchanged.steps,
                    "bytes_per_step": exchanged.per_step(),
                    "bytes_per_block" if exchanged.blocks > 1 else "bytes": exchanged.per_block(),
                    "busy_seconds": {name: round(seconds, 3) for name, seconds in self.busy(stage).items()},
                    "bottleneck": {self._title(pair): self.bottleneck(stage, pair) for pair in self.pairs},
                }
                for stage, exchanged in self.exchanged.items()
            },
        }

    def show(self, out: Console) -> None:
        """Two tables: bytes by kind, and time; under them what each stage waits for."""
        table = Table(title=f"forecast, MB that each of {self.world} hands over, at most")
        table.add_column("stage")
        table.add_column("in")
        for kind in _KINDS:
            table.add_column("between nodes" if kind == OWNERS else kind, justify="right")
        for stage, exchanged in self.exchanged.items():
            rows = [("a step", exchanged.per_step())] if exchanged.steps else []
            rows += [("a block" if exchanged.blocks > 1 else "all", exchanged.per_block())]
            for where, sizes in rows:
                table.add_row(stage, where, *(_size(sizes.get(kind, 0)) for kind in _KINDS))
        print_table(out, table)
        times = Table(title="forecast, time of each rank from operations and bytes")
        for column in ("stage", *map(self._title, self.pairs)):
            times.add_column(column, justify="left" if column == "stage" else "right")
        for stage, by_links in self.seconds().items():
            times.add_row(stage, *map(span, by_links.values()))
        print_table(out, times)
        for stage in self.exchanged:
            busy = ", ".join(f"{name} {span(seconds)}" for name, seconds in self.busy(stage).items())
            held = self.bottleneck(stage, (NVLINK, FAST))
            slow = self.bottleneck(stage, self.pairs[-1])
            cause = f"held up by {held}" + (f", with the slower links by {slow}" if slow != held else "")
            out.print(f"{stage}: {cause}; busy: {busy}", highlight=False, soft_wrap=True)


def _size(size: int) -> str:
    return "-" if not size else f"{size / _MB:,.1f}" if size >= _MB / 10 else "< 0.1"
