"""Names of a model's tensors: as files have them, and as its modules have them here, each expert's linears by themselves."""

import re
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from lbllm_cli.core.headers import Part, TensorEntry
from lbllm_cli.models.families import Family

_BLOCK = re.compile(r"^(model\.layers\.\d+\.)(.+)$")
_NUMBER = re.compile(r"(?<=\.experts\.)\d+(?=\.)")


def stored_part(family: Family, name: str) -> Part | None:
    """Where files hold a tensor; None for what they hold whole, under the same name."""
    match = _BLOCK.match(name)
    if match is None or not family.stored:
        return None
    number = _NUMBER.search(match[2])
    part = family.stored.get(_NUMBER.sub("{e}", match[2]))
    if part is None:
        return None
    if number is None or "{e}" in part.name:
        return replace(part, name=match[1] + part.name.replace("{e}", number[0] if number else ""))
    return replace(part, name=match[1] + part.name, index=int(number[0]))


def named_entries(family: Family, entries: dict[str, TensorEntry], names: Iterable[str]) -> dict[str, TensorEntry]:
    """Stored tensors by the names that modules have here. names: of the modules. What no module claims keeps its own name."""
    if not family.stored:
        return entries
    found, claimed = {}, set()
    for name in names:
        part = stored_part(family, name)
        stored = entries.get(name if part is None else part.name)
        if stored is None:
            continue
        claimed.add(name if part is None else part.name)
        found[name] = stored if part is None else replace(stored, shape=part.shape(stored.shape), part=part)
    return found | {name: entry for name, entry in entries.items() if name not in claimed}


def as_stored(family: Family, tensors: dict[str, Tensor], experts: int) -> dict[str, Tensor]:
    """Tensors of whole blocks as files of the source have them. experts: in a block."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        part = stored_part(family, name)
        if part is None or (part.index is None and part.half is None and not part.transposed):
            found[name if part is None else part.name] = tensor
            continue
        if part.name not in found:
            rows = tensor.shape[0] * (1 if part.half is None else 2), *tensor.shape[1:]
            shape = rows[::-1] if part.transposed else rows
            indexed = shape if part.index is None else (experts, *shape)
            found[part.name] = torch.empty(indexed, dtype=tensor.dtype, device=tensor.device)
        whole = found[part.name]
        part.of(whole if part.index is None else whole[part.index]).copy_(tensor)
    return found
