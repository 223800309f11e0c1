"""What a stage's own package has to say: module `stage` of `lbllm_cli.<StageSpec.package>`, found by the table of stages."""

from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, cast

from torch import Tensor

from lbllm_cli.format.activations import ActivationFormat
from lbllm_cli.pipeline.checkpoint import Checkpoint
from lbllm_cli.pipeline.duration import Part
from lbllm_cli.pipeline.forecast import Need
from lbllm_cli.pipeline.plan import Plan
from lbllm_cli.pipeline.reporter import Reporter
from lbllm_cli.pipeline.stage_writer import StageWriter
from lbllm_cli.pipeline.traffic import Exchanged
from lbllm_cli.recipe.stages import StageSpec


@dataclass(frozen=True)
class StageRun:
    """A stage that is running.

    tokens: int64 [rows, length]. parent: the checkpoint that it goes on from. activations: how its blocks quantize them, if they
    do.
    """

    spec: StageSpec
    plan: Plan
    need: Need
    tokens: Tensor
    parent: Checkpoint | None
    activations: ActivationFormat | None
    writer: StageWriter
    reporter: Reporter

    def keep_outer(self) -> None:
        """Takes over what the parent has trained outside the blocks."""
        if self.parent is not None and (outer := self.parent.read_outer()):
            self.writer.write_outer(outer)


class StageWork(Protocol):
    """The module of a stage."""

    def check(self, plan: Plan) -> None:
        """Raises UsageError for what this stage cannot do with a recipe, before anything is read."""

    def need(self, plan: Plan, spec: StageSpec, tokens: Tensor | None) -> Need:
        """What it will need. tokens: where they are known already; only kept results of theirs are looked up with them."""

    def work(self, plan: Plan, spec: StageSpec) -> list[Part]:
        """What it computes and moves, for a forecast of time; of the rank of `plan.world` that has most."""

    def exchanged(self, plan: Plan, spec: StageSpec) -> Exchanged:
        """What its ranks hand over, where there are several; of `plan.world`."""

    def activations(self, plan: Plan, parent: Checkpoint | None) -> ActivationFormat | None:
        """How the blocks that it makes quantize activations, if they do. parent: what it goes on from."""

    def run(self, run: StageRun) -> None:
        """Writes and commits all blocks, from the last committed one on."""


def work_of(spec: StageSpec) -> StageWork:
    """The work of a stage; its package is imported here, and not before."""
    return cast(StageWork, import_module(f"lbllm_cli.{spec.package}.stage"))


def parents_activations(plan: Plan, parent: Checkpoint | None) -> ActivationFormat | None:
    """`StageWork.activations` of a stage that leaves them as they are."""
    return None if parent is None else parent.activations
