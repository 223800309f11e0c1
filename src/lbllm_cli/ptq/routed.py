"""Moments of what experts read: of the tokens that the router sends to each, and of all tokens for those that get too few."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lbllm_cli.models.block import Block
from lbllm_cli.ptq.moments import InputMoments
from lbllm_cli.ptq.passes import is_down
from lbllm_cli.runtime.experts import DOWN, Experts, expert_of, experts_of
from lbllm_cli.runtime.units import Unit


class StopForward(Exception):
    """Raised by a hook: nothing after it needs to run."""


@dataclass
class Sent:
    """What a block's experts were called with: hidden states [tokens, hidden], and experts that each token chose [tokens, k]."""

    hidden: Tensor
    chosen: Tensor


@contextmanager
def sent_in(block: Block, stop: str | None) -> Iterator[list[Sent]]:
    """Collects what the router sends in a pass. stop: whether the pass ends "before" the experts, "after" them, or runs on."""
    experts = _experts(block)
    found: list[Sent] = []

    def before(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found[:] = [Sent(inputs[0], inputs[1])]
        if stop == "before":
            raise StopForward

    def after(*_: object) -> None:
        if stop == "after":
            raise StopForward

    handles = [experts.register_forward_pre_hook(before), experts.register_forward_hook(after)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def down_inputs(block: Block) -> list[str]:
    """Names of the last linear of each expert."""
    return [name for name in block.linears if expert_of(name) is not None and name.endswith(f".{DOWN}")]


def _experts(block: Block) -> Experts:
    found = experts_of(block.layer)
    assert found is not None
    return found


def add_routed(
    blocks: tuple[Block, Block],
    read: dict[str, Tensor],
    sent: tuple[Sent, Sent | None],
    moments: dict[Unit, InputMoments],
    common: dict[bool, InputMoments],
) -> None:
    """Adds what one batch sends to experts.

    blocks: student and teacher. read: what the student's last linears of experts read, by name. sent: to the student's experts
    and to the teacher's, None where the full-precision stream is not followed; its tokens go where the quantized stream's go, for
    both are inputs of one matrix. moments: to add to, by unit. common: to add all tokens to, by whether they are of inner states.
    """
    student, teacher = map(_experts, blocks)
    mine, its = sent
    order, counts = student.tokens_of(mine.chosen)
    rows = (order // mine.chosen.shape[1]).split(counts)
    names = {_number(name): name for name in read if expert_of(name) is not None}
    units: dict[tuple[int, bool], InputMoments] = {(_number(unit[0]), is_down(unit)): found for unit, found in moments.items()}
    if False in common:
        common[False].add(mine.hidden, None if its is None else its.hidden)
    for number, tokens in enumerate(rows):
        if not len(tokens):
            continue
        full = None if its is None else its.hidden[tokens]
        if (number, False) in units:
            units[number, False].add(mine.hidden[tokens], full)
        inner = [found for found in (units.get((number, True)), common.get(True)) if found is not None]
        wanted = teacher.expert(number).inner(full) if inner and full is not None else None
        for found in inner:
            found.add(read[names[number]], wanted)


def _number(linear: str) -> int:
    place = expert_of(linear)
    assert place is not None
    return place[1]


def shrunk(own: InputMoments, common: InputMoments, share: float) -> InputMoments:
    """Moments of an expert, drawn towards those of all tokens: `share` of its mean and the rest of theirs.

    An expert that fewer tokens than its width reach has a Hessian without full rank, and the little it says is not to be trusted:
    share = min(1, tokens / width), as a shrinkage estimator whose strength is what is missing (Ledoit and Wolf, 2004, choose it
    by variance). Counted as many tokens as the expert has, at least one.
    """
    tokens = max(own.tokens, 1)

    def mixed(mine: Tensor, its: Tensor) -> Tensor:
        return torch.add(mine * (share / tokens), its, alpha=(1 - share) / max(common.tokens, 1)) * tokens

    drift = None if own.drift is None or common.drift is None else mixed(own.drift, common.drift)
    return InputMoments(mixed(own.hessian, common.hessian), drift, tokens)
