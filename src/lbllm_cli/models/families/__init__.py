"""Families of models: every file in this folder is one, and says what running a block cannot tell.

Which linears a block has, and which of them read the same tensor, is found by running one (`runtime.units`); masks, positions and
the order of a block are transformers' own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import Any


def _one(config: Any) -> float:
    return 1.0


@dataclass(frozen=True)
class Family:
    """One value of `model_type`.

    text: the models that it is known by, for messages and documents. embedding_scale: what embeddings are multiplied by before
    the first block, by the configuration. logit_scale: what the head's products are multiplied by. norm_offset: what is added to
    a stored norm weight before it is used; 1 where weights are stored about zero.
    """

    model_type: str
    text: str
    embedding_scale: Callable[[Any], float] = _one
    logit_scale: Callable[[Any], float] = _one
    norm_offset: float = 0.0


def _found() -> dict[str, Family]:
    modules = [import_module(f"{__name__}.{item.name}") for item in iter_modules(__path__)]
    return {module.FAMILY.model_type: module.FAMILY for module in modules}


FAMILIES: dict[str, Family] = _found()
