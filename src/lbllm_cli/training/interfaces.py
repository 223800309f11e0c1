"""What the training loop asks of what is trained, and of what it is trained towards."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor, nn

from lbllm_cli.models.block import Block
from lbllm_cli.training.progress import Progress
from lbllm_cli.training.tally import Scale

# Sequences that tables of quantizers, and the energies of channels, are taken from.
SEQUENCES = 8


class ParameterGroup(NamedTuple):
    """Parameters that share a rate. top: their learning rate at the top of the schedule. unit: their scale."""

    params: list[nn.Parameter]
    kind: str
    top: float
    unit: float


class OwnStep(Protocol):
    """A parameter whose gradient is never a tensor of its own: whoever has it measures it and takes AdamW's step with it."""

    parameter: nn.Parameter

    def square(self) -> Tensor:
        """Sum of the gradient's squares, float32 []."""

    def step(self, state: dict[str, Tensor], scale: Scale, rate: float) -> None:
        """AdamW's step. state: the optimizer's, whose `step` is this one's number."""


class Trained(Protocol):
    """What is trained."""

    def groups(self) -> list["ParameterGroup"]:
        """What AdamW moves."""

    def own_steps(self) -> list[OwnStep]:
        """Parameters among them that move themselves, after `backward`."""

    def spread_weights(self) -> list[tuple[nn.Parameter, int]]:
        """Weights in a block whose gradient belongs to one rank of a machine, and its number, in the order of the linears."""

    def copies(self) -> list[nn.Parameter]:
        """Parameters that every rank has and moves alike: their gradients are summed over all."""

    def begin(self, progress: float) -> None:
        """Before a step, and before it is measured: it runs with the present parameters. progress: share of the steps done."""

    def settle(self) -> None:
        """Until nothing that `begin` has set going is on its way."""

    def backward(self) -> None:
        """After the backward passes of a step: carries gradients to the parameters where autograd has not."""

    def constrain(self) -> None:
        """After a step."""

    def snapshot(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint."""

    def resumed(self) -> None:
        """After the parameters were replaced by saved ones."""

    def facts(self) -> dict[str, float]:
        """What an epoch's record says about the present state."""


class Student(Trained, Protocol):
    """A block in training."""

    block: Block


@dataclass(frozen=True)
class Step:
    """What an optimizer step came to. number: of all steps of a training, from 1. steps: all. tokens: seen so far."""

    loss: float
    seconds: float
    number: int
    steps: int
    tokens: int


class Objective(Protocol):
    """What a student is trained towards. errors: names of the held-out errors that `held_out` finds."""

    errors: ClassVar[tuple[str, ...]]

    @property
    def student(self) -> Trained:
        """What is trained."""

    def feed(self, pieces: list[Tensor]) -> Iterator[tuple[Tensor, ...]]:
        """What a micro-batch needs, on the device. pieces: row numbers int64 [n]; the first tensor has n rows too."""

    def loss(self, piece: tuple[Tensor, ...], start: dict[str, float]) -> Tensor:
        """Differentiable mean over a micro-batch's tokens. start: held-out errors of the student as it began."""

    def held_out(self, rows: list[int], progress: Progress) -> dict[str, float]:
        """Errors of the present student on some rows. progress: whose `start` is empty where it is just beginning."""

    def score(self, held: dict[str, float], start: dict[str, float]) -> tuple[float, bool]:
        """Held-out loss, 1 for the start's, out of such errors; whether they allow the student to be the best."""

    def stepped(self, step: Step, progress: Progress) -> None:
        """After every step; on a GPU some steps later, in their order."""
