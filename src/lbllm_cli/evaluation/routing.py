"""Whether a student's tokens go to the experts that the teacher's go to."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lbllm_cli.models.block import Block
from lbllm_cli.runtime.experts import experts_of


@contextmanager
def choices_of(block: Block) -> Iterator[list[Tensor]]:
    """Collects which experts tokens chose, int16 [tokens, k] of each pass, in RAM; nothing of a block without experts."""
    experts, found = experts_of(block.layer), list[Tensor]()

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(inputs[1].to("cpu", torch.int16))

    handle = None if experts is None else experts.register_forward_pre_hook(keep)
    try:
        yield found
    finally:
        if handle is not None:
            handle.remove()


def agreements(teacher: list[Tensor], student: list[Tensor]) -> tuple[int, int]:
    """How many of the teacher's choices the student makes as well, whatever their order, and how many there are.

    int16 [tokens, k] of equal passes: [[0, 3]] and [[3, 1]] -> (1, 2).
    """
    same = sum(int((a.unsqueeze(2) == b.unsqueeze(1)).sum()) for a, b in zip(teacher, student, strict=True))
    return same, sum(part.numel() for part in teacher)
