"""What the stages of a recipe will take, as `lbllm validate` shows it."""

from typing import Any

from rich.console import Console
from rich.table import Table

from lbllm_cli.cli.forecasts import print_table
from lbllm_cli.pipeline.forecast import Need
from lbllm_cli.pipeline.plan import Plan
from lbllm_cli.pipeline.work import work_of
from lbllm_cli.runtime.cards import CARDS, card_of, probed


class Durations:
    """What the stages of a recipe will take, here and on cards that everybody knows."""

    def __init__(self, plan: Plan, needs: list[Need]):
        model = plan.model
        own = card_of(model.backend.describe(model.device))
        here = own or probed(model.device)
        self.cards = [here, *(card for card in CARDS.values() if card is not here)]
        self.usual = own or CARDS["h100"]
        self.parts = {spec.name: work_of(spec).work(plan, spec) for spec in plan.recipe.stages}
        self.places = {need.stage: need.place for need in needs}

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        return {"forecast_seconds": self.seconds()}

    def seconds(self) -> dict[str, dict[str, int]]:
        """By stage and card."""
        return {
            stage: {card.name: round(sum(part.seconds(card, self.places[stage]) for part in parts)) for card in self.cards}
            for stage, parts in self.parts.items()
        }

    def show(self, out: Console) -> None:
        """A table, and under it what takes longest in each stage and which key halves that."""
        table = Table(title="forecast, time from operations and bytes")
        table.add_column("stage")
        for card in self.cards:
            table.add_column(card.name, justify="right")
        for stage, by_card in self.seconds().items():
            table.add_row(stage, *map(span, by_card.values()))
        print_table(out, table)
        for stage, parts in self.parts.items():
            place = self.places[stage]
            part = max(parts, key=lambda part: part.seconds(self.usual, place))
            limit = part.limit(self.usual, place)
            cause = f"on the {self.usual.name} most of it for {part.name}, held up by {limit}"
            out.print(f"{stage}: {cause}; half of {part.key} halves it", highlight=False, soft_wrap=True)


def span(seconds: float) -> str:
    """Seconds in words: 5400 -> "1.5 h", 90 -> "2 min", 20 -> "20 s"."""
    if seconds > 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds > 60 else f"{seconds:.0f} s"
