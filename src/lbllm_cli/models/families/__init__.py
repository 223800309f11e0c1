"""Families of models: every file in this folder is one, and says what running a block cannot tell.

Which linears a block has, and which of them read the same tensor, is found by running one (`runtime.units`); masks, positions and
the order of a block are transformers' own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from lbllm_cli.core.headers import Part


def _one(config: Any) -> float:
    return 1.0


def _none(config: Any) -> float | None:
    return None


@dataclass(frozen=True)
class Family:
    """One value of `model_type`.

    text: the models that it is known by, for messages and documents. embedding_scale: what embeddings are multiplied by before
    the first block, by the configuration; in the compute dtype, as transformers does. logit_divisor: what the head's products are
    divided by. logit_cap: c where logits z are then c tanh(z / c). plain_softmax: whether attention is a softmax of scores, which
    does not see a number added to all of them: no soft cap, no sinks. norm_offset: what is added to a stored norm weight before
    it is used; 1 where weights are stored about zero. stored: of a block, where files hold tensors that modules have under
    other names here, or in one with others; {e} stands for the number of an expert, and of files that have all experts in one
    tensor it is the index on its first axis. within: models that see pictures as well, and have this one inside.
    begins: whether it is lost on text that does not begin with BOS. drafted: section of a recipe -> keys that `lbllm init` gives
    it beside the usual ones, for what was measured on a model of the family; measured: which one.
    """

    model_type: str
    text: str
    embedding_scale: Callable[[Any], float] = _one
    logit_divisor: Callable[[Any], float] = _one
    logit_cap: Callable[[Any], float | None] = _none
    plain_softmax: bool = True
    norm_offset: float = 0.0
    stored: Mapping[str, Part] = field(default_factory=dict)
    within: tuple[str, ...] = ()
    begins: bool = False
    drafted: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    measured: str = ""


def _found() -> dict[str, Family]:
    modules = [import_module(f"{__name__}.{item.name}") for item in iter_modules(__path__)]
    return {module.FAMILY.model_type: module.FAMILY for module in modules}


FAMILIES: dict[str, Family] = _found()
