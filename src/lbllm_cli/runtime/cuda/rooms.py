"""Rooms for the records of a cache on a GPU: where they lie has to stay, for as long as a captured graph reads them there."""

import torch
from torch import Tensor

from lbllm_cli.runtime.kv_cache import RecordLayer

# Tokens that a room grows by at least: for each larger room a graph is captured.
_STEP = 256


def _roomy(kept: Tensor, room: Tensor | None, tokens: int) -> Tensor:
    """A room that begins with `kept`, uint8 [rows, heads, n, bytes], with space for `tokens` more: `room` itself, if it can."""
    rows, heads, held, size = kept.shape
    if room is not None and _fits(room, kept, tokens):
        if kept.data_ptr() == room.data_ptr() and kept.stride() == room.stride():
            return room
        # Reordered for beams, say: copied back, so that the graph goes on. Not what is another part of the room itself.
        if kept.untyped_storage().data_ptr() != room.untyped_storage().data_ptr():
            room[:, :, :held].copy_(kept)
            return room
    capacity = -(-(held + tokens + held // 2) // _STEP) * _STEP
    # What inference mode makes could not be written to outside of it.
    with torch.inference_mode(False):
        made = torch.empty(rows, heads, capacity, size, dtype=kept.dtype, device=kept.device)
    made[:, :, :held].copy_(kept)
    return made


def _fits(room: Tensor, kept: Tensor, tokens: int) -> bool:
    rows, heads, held, size = kept.shape
    alike = room.device == kept.device and room.shape == (rows, heads, room.shape[2], size)
    return alike and room.is_contiguous() and room.shape[2] >= held + tokens


def rooms_for(layer: RecordLayer, tokens: int) -> tuple[Tensor, Tensor]:
    """The rooms of a layer's keys and values, in which `layer.grown(tokens)` then moves nothing.

    uint8 [rows, heads, capacity, bytes], contiguous; capacity a multiple of 256, and half as much again where it grows.
    """
    held = layer.keys.shape[2]
    keys, values = _roomy(layer.keys, layer._key_room, tokens), _roomy(layer.values, layer._value_room, tokens)
    if layer.keys.data_ptr() != keys.data_ptr():
        layer.keys, layer._key_room = keys.narrow(2, 0, held), keys
    if layer.values.data_ptr() != values.data_ptr():
        layer.values, layer._value_room = values.narrow(2, 0, held), values
    return keys, values


def kept_rooms(layer: RecordLayer) -> tuple[Tensor, Tensor]:
    """The same, of a layer that nothing has happened to since."""
    keys, values = layer._key_room, layer._value_room
    assert keys is not None
    assert values is not None
    return keys, values
