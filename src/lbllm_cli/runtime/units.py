"""Which linears of a decoder layer read the same tensor: found by running it once, without values."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lbllm_cli.core.errors import RunError

# Linears that read one tensor, in the order in which they are called.
Unit = tuple[str, ...]
Units = tuple[Unit, ...]


class _Found(Exception):
    """Ends a pass: the layer has run."""


@contextmanager
def _looking_at_no_values(decoder: Any) -> Iterator[None]:
    """Meanwhile attention is the plain one, and angles do not depend on how long a text is: on the meta device there is nothing
    to look at, and some kernels do not run.
    """
    config, rotary = decoder.config, getattr(decoder, "rotary_emb", None)
    attention, kind = config._attn_implementation, getattr(rotary, "rope_type", None)
    config._attn_implementation = "eager"
    if kind == "dynamic":
        rotary.rope_type = "default"  # type: ignore[union-attr]
    try:
        yield
    finally:
        config._attn_implementation = attention
        if kind == "dynamic":
            rotary.rope_type = kind  # type: ignore[union-attr]


def find_units(decoder: Any, names: Collection[str]) -> Units:
    """Units of a decoder's first layer, by names in the layer, in the order in which they are called.

    decoder: transformers' own, on the meta device. names: linears to look at, in a layer. Raises RunError naming those that a
    pass does not call. Llama: (q_proj, k_proj, v_proj), (o_proj,), (gate_proj, up_proj), (down_proj,), each with its owner's
    name.
    """
    layer: nn.Module = decoder.layers[0]
    called: list[tuple[str, Tensor]] = []

    def note(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        called.append((name, inputs[0]))

    def stop(*_: Any) -> None:
        raise _Found

    handles: list[Any] = [layer.get_submodule(name).register_forward_pre_hook(partial(note, name)) for name in names]
    handles.append(layer.register_forward_hook(stop))
    weight = next(layer.parameters())
    hidden = torch.empty(1, 2, decoder.config.hidden_size, dtype=weight.dtype, device="meta")
    # A mask of four axes is taken as it is; to make one, values are looked at.
    mask = torch.empty(1, 1, 2, 2, dtype=weight.dtype, device="meta")
    try:
        with torch.no_grad(), _looking_at_no_values(decoder):
            decoder(inputs_embeds=hidden, attention_mask=mask, use_cache=False)
    except _Found:
        pass
    finally:
        for handle in handles:
            handle.remove()
    units: list[tuple[Tensor, list[str]]] = []
    for name, read in called:
        same = next((unit for tensor, unit in units if tensor is read), None)
        if same is None:
            units.append((read, [name]))
        else:
            same.append(name)
    if missed := sorted(set(names) - {name for name, _ in called}):
        raise RunError(f"{type(layer).__name__}: a pass does not call {', '.join(missed)}")
    return tuple(tuple(unit) for _, unit in units)
