"""Hostile calls of a whole packed model: its cache, masks, positions, hidden states and modules. Each as `case(model)`."""

from collections.abc import Callable
from typing import Any

import torch

Case = Callable[[Any], Any]
MODEL: dict[str, Case] = {}
PROMPT = torch.tensor([[5, 9, 100, 7, 33, 250, 8]])


def case(function: Case) -> Case:
    """Registers a case under its name."""
    MODEL[function.__name__] = function
    return function


def filled(model: Any, rows: int = 1) -> Any:
    """A cache that holds the prompt."""
    from lbllm_cli.runtime.kv_cache import QuantizedKVCache

    cache = QuantizedKVCache(model)
    model(PROMPT.expand(rows, -1), past_key_values=cache)
    return cache


def ids(rows: int) -> torch.Tensor:
    """One token for each row."""
    return torch.arange(3, 3 + rows)[:, None]


def stepped(rows: int, tokens_of: int = 1) -> Case:
    """A step of `rows` rows on a cache of `tokens_of` rows, and another after it."""

    def go(model: Any) -> Any:
        cache = filled(model, tokens_of)
        first = model(ids(rows), past_key_values=cache).logits
        return torch.cat([first, model(ids(rows), past_key_values=cache).logits])

    return go


for count in (2, 3, 16, 64):
    MODEL[f"{count}_rows_on_one"] = stepped(count)
MODEL["one_row_on_three"] = stepped(1, 3)
MODEL["two_rows_on_three"] = stepped(2, 3)
MODEL["four_rows_on_two"] = stepped(4, 2)


def edited(change: Callable[[Any], None], rows: int = 1, **options: Any) -> Case:
    """A step after every layer of its cache was changed."""

    def go(model: Any) -> Any:
        cache = filled(model, rows)
        for layer in cache.layers:
            change(layer)
        return model(ids(rows), past_key_values=cache, **options).logits

    return go


def _keys(change: Callable[[torch.Tensor], torch.Tensor], *names: str) -> Callable[[Any], None]:
    def go(layer: Any) -> None:
        for name in names or ("keys", "values"):
            setattr(layer, name, change(getattr(layer, name)))

    return go


MODEL |= {
    "fewer_heads": edited(_keys(lambda t: t[:, :1])),
    "fewer_heads_of_values": edited(_keys(lambda t: t[:, :1], "values")),
    "no_heads": edited(_keys(lambda t: t[:, :0])),
    "more_heads": edited(_keys(lambda t: torch.cat([t, t], 1))),
    "shorter_records": edited(_keys(lambda t: t[..., :-1])),
    "shorter_records_of_values": edited(_keys(lambda t: t[..., :-4], "values")),
    "longer_records": edited(_keys(lambda t: torch.cat([t, t], -1))),
    "values_shorter_than_keys": edited(_keys(lambda t: t[:, :, :-2], "values")),
    "keys_shorter_than_values": edited(_keys(lambda t: t[:, :, :-2], "keys")),
    "values_without_tokens": edited(_keys(lambda t: t[:, :, :0], "values")),
    "no_tokens": edited(_keys(lambda t: t[:, :, :0])),
    "float_records": edited(_keys(lambda t: t.float())),
    "int8_records": edited(_keys(lambda t: t.view(torch.int8))),
    "int64_records": edited(_keys(lambda t: t.long())),
    "records_of_three_dimensions": edited(_keys(lambda t: t[0])),
    "values_of_fewer_rows": edited(_keys(lambda t: t[:1], "values"), 3),
    "keys_of_fewer_rows": edited(_keys(lambda t: t[:1], "keys"), 3),
    "transposed_records": edited(_keys(lambda t: t.transpose(1, 2).contiguous().transpose(1, 2))),
    "transposed_bytes": edited(_keys(lambda t: t.transpose(2, 3).contiguous().transpose(2, 3))),
    "every_second_byte": edited(_keys(lambda t: torch.stack([t, t * 0], -1).flatten(-2)[..., ::2])),
    "records_backwards": edited(_keys(lambda t: t.flip(2).flip(2))),
    "records_of_a_view": edited(_keys(lambda t: torch.cat([t, t], 2)[:, :, : t.shape[2]])),
    "expanded_records": edited(_keys(lambda t: t[:1].expand(3, -1, -1, -1)), 3),
    "random_records": edited(_keys(lambda t: torch.full_like(t, 0xA5))),
    "records_of_large_marks": edited(_keys(lambda t: torch.full_like(t, 0xFF))),
    "mask_too_long": edited(lambda layer: None, attention_mask=torch.ones(1, 40, dtype=torch.long)),
    "mask_too_short": edited(lambda layer: None, attention_mask=torch.ones(1, 3, dtype=torch.long)),
    "mask_of_other_rows": edited(lambda layer: None, 2, attention_mask=torch.ones(3, 8, dtype=torch.long)),
    "mask_of_one_row": edited(lambda layer: None, 2, attention_mask=torch.ones(1, 8, dtype=torch.long)),
    "mask_of_nothing": edited(lambda layer: None, attention_mask=torch.ones(0, 8, dtype=torch.long)),
    "mask_of_four": edited(lambda layer: None, attention_mask=torch.zeros(1, 1, 1, 8)),
    "mask_of_four_too_short": edited(lambda layer: None, attention_mask=torch.zeros(1, 1, 1, 4)),
    "mask_of_four_rows": edited(lambda layer: None, attention_mask=torch.zeros(4, 1, 1, 8)),
    "mask_of_four_heads": edited(lambda layer: None, attention_mask=torch.zeros(1, 4, 1, 8)),
    "mask_of_four_queries": edited(lambda layer: None, attention_mask=torch.zeros(1, 1, 0, 8)),
    "mask_of_booleans": edited(lambda layer: None, attention_mask=torch.ones(1, 1, 1, 8, dtype=torch.bool)),
    "mask_not_contiguous": edited(lambda layer: None, 2, attention_mask=torch.zeros(8, 1, 1, 2).transpose(0, 3)),
    "mask_of_infinities": edited(lambda layer: None, attention_mask=torch.tensor([[[[float("-inf")] * 3 + [0.0] * 5]]])),
    "positions_of_other_rows": edited(lambda layer: None, 2, position_ids=torch.tensor([[7], [7], [7]])),
    "positions_of_two": edited(lambda layer: None, position_ids=torch.tensor([[7, 8]])),
    "positions_of_none": edited(lambda layer: None, position_ids=torch.zeros(1, 0, dtype=torch.long)),
    "positions_below_zero": edited(lambda layer: None, position_ids=torch.tensor([[-9]])),
    "positions_far_away": edited(lambda layer: None, position_ids=torch.tensor([[10**6]])),
    "positions_of_floats": edited(lambda layer: None, position_ids=torch.tensor([[7.0]])),
}


def through(change: Callable[[Any], Any], rows: int, before: int = 1) -> Case:
    """A step of `rows` rows after a change of a whole cache."""

    def go(model: Any) -> Any:
        cache = filled(model, before)
        change(cache)
        first = model(ids(rows), past_key_values=cache).logits
        return torch.cat([first, model(ids(rows), past_key_values=cache).logits])

    return go


MODEL |= {
    "cropped": through(lambda cache: cache.crop(4), 1),
    "cropped_from_behind": through(lambda cache: cache.crop(-2), 1),
    "cropped_to_nothing": through(lambda cache: cache.crop(0), 1),
    "cropped_beyond": through(lambda cache: cache.crop(10**6), 1),
    "cropped_after_growing": through(lambda cache: (cache.batch_repeat_interleave(3), cache.crop(3)), 3),
    "reordered": through(lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1])), 3, 3),
    "reordered_to_more": through(lambda cache: cache.reorder_cache(torch.tensor([0, 0, 1, 1, 2])), 5, 3),
    "reordered_to_fewer": through(lambda cache: cache.reorder_cache(torch.tensor([1])), 3, 3),
    "repeated": through(lambda cache: cache.batch_repeat_interleave(4), 4),
    "repeated_once_too_often": through(lambda cache: cache.batch_repeat_interleave(4), 3),
    "selected": through(lambda cache: cache.batch_select_indices(torch.tensor([1])), 1, 3),
    "selected_nothing": through(lambda cache: cache.batch_select_indices(torch.tensor([], dtype=torch.long)), 1, 3),
    "reset": through(lambda cache: cache.reset(), 1),
    "fewer_layers": through(lambda cache: cache.layers.pop(), 1),
    "layers_swapped": through(lambda cache: cache.layers.reverse(), 1),
    "one_layer_shorter": through(lambda cache: cache.layers[1].crop(3), 1),
}


def embedded(change: Callable[[torch.Tensor], torch.Tensor]) -> Case:
    """A step from hidden states instead of a token."""

    def go(model: Any) -> Any:
        cache = filled(model)
        hidden = model.get_input_embeddings()(ids(1))
        return model(inputs_embeds=change(hidden), past_key_values=cache).logits.float()

    return go


MODEL |= {
    "hidden_too_narrow": embedded(lambda t: t[..., :-1]),
    "hidden_too_wide": embedded(lambda t: torch.cat([t, t], -1)),
    "hidden_of_no_width": embedded(lambda t: t[..., :0]),
    "hidden_of_two_dimensions": embedded(lambda t: t[0]),
    "hidden_of_four_dimensions": embedded(lambda t: t.unsqueeze(0)),
    "hidden_not_contiguous": embedded(lambda t: torch.stack([t, t * 0], -1).flatten(-2)[..., ::2]),
    "hidden_expanded": embedded(lambda t: t[..., :1].expand_as(t)),
    "hidden_of_nan": embedded(lambda t: t * float("nan")),
    "hidden_of_infinity": embedded(lambda t: t * float("inf")),
    "hidden_huge": embedded(lambda t: t * 1e37),
    "hidden_tiny": embedded(lambda t: t * 1e-42),
    "hidden_of_no_rows": embedded(lambda t: t[:0]),
    "hidden_of_no_tokens": embedded(lambda t: t[:, :0]),
}


MODEL["no_rows_at_all"] = lambda model: model(PROMPT[:0]).logits
MODEL["no_tokens_at_all"] = lambda model: model(PROMPT[:, :0]).logits


@case
def steps_far_beyond_the_room(model: Any) -> Any:
    cache = filled(model)
    for _ in range(300):
        logits = model(ids(1), past_key_values=cache).logits
    return logits


@case
def a_copied_cache_goes_another_way(model: Any) -> Any:
    import copy

    cache = filled(model)
    model(ids(1), past_key_values=cache)
    other = copy.deepcopy(cache)
    first = model(ids(1), past_key_values=cache).logits
    second = model(ids(1) + 4, past_key_values=other).logits
    return torch.cat([first, second, model(ids(1), past_key_values=cache).logits])


def layer_call(**changes: Callable[[torch.Tensor], Any]) -> Case:
    """A decoder layer called by hand, one of its arguments changed."""

    def go(model: Any) -> Any:
        cache, layer = filled(model), model.model.layers[0]
        hidden = model.get_input_embeddings()(ids(1))
        angles = model.model.rotary_emb(hidden, torch.tensor([[7]]))
        given = {"cos": angles[0], "sin": angles[1], "mask": torch.zeros(1, 1, 1, 8), "hidden": hidden}
        given |= {name: change(given[name]) for name, change in changes.items()}
        out = layer(
            given["hidden"], attention_mask=given["mask"], past_key_values=cache, position_embeddings=(given["cos"], given["sin"])
        )
        return out if isinstance(out, torch.Tensor) else out[0]

    return go


MODEL |= {
    "angles_too_narrow": layer_call(cos=lambda t: t[..., :-2], sin=lambda t: t[..., :-2]),
    "angles_too_wide": layer_call(cos=lambda t: torch.cat([t, t], -1), sin=lambda t: torch.cat([t, t], -1)),
    "sine_too_narrow": layer_call(sin=lambda t: t[..., :4]),
    "angles_of_other_rows": layer_call(cos=lambda t: t.expand(3, -1, -1), sin=lambda t: t.expand(3, -1, -1)),
    "angles_of_two_tokens": layer_call(cos=lambda t: torch.cat([t, t], 1), sin=lambda t: torch.cat([t, t], 1)),
    "angles_of_doubles": layer_call(cos=lambda t: t.double(), sin=lambda t: t.double()),
    "angles_of_halves": layer_call(cos=lambda t: t.half(), sin=lambda t: t.half()),
    "angles_expanded": layer_call(cos=lambda t: t[..., :1].expand_as(t), sin=lambda t: t[..., :1].expand_as(t)),
    "angles_of_one_number": layer_call(cos=lambda t: t[..., :1], sin=lambda t: t[..., :1]),
    "angles_of_two_dimensions": layer_call(cos=lambda t: t[0], sin=lambda t: t[0]),
    "layer_without_mask": layer_call(mask=lambda t: None),
    "layer_mask_too_short": layer_call(mask=lambda t: t[..., :5]),
    "layer_mask_of_two_dimensions": layer_call(mask=lambda t: t[0, 0]),
    "layer_mask_of_integers": layer_call(mask=lambda t: t.long()),
    "layer_hidden_too_narrow": layer_call(hidden=lambda t: t[..., :-4]),
    "layer_hidden_of_two_rows": layer_call(hidden=lambda t: t.expand(2, -1, -1)),
    "layer_hidden_of_doubles": layer_call(hidden=lambda t: t.double()),
    "layer_hidden_of_integers": layer_call(hidden=lambda t: t.long()),
}


def changed(change: Callable[[Any], None]) -> Case:
    """A step after an edit of the loaded model."""

    def go(model: Any) -> Any:
        cache = filled(model)
        change(model.model.layers[0])
        return model(ids(1), past_key_values=cache).logits.float()

    return go


def _parameter(path: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Case:
    def go(layer: Any) -> None:
        owner, name = path.rsplit(".", 1)
        module = layer.get_submodule(owner)
        tensor = change(getattr(module, name).data)
        setattr(module, name, torch.nn.Parameter(tensor, requires_grad=False) if name in module._parameters else tensor)

    return changed(go)


_NORM, _BIAS, _INPUT, _CACHED = "input_layernorm.weight", "self_attn.q_proj.bias", "self_attn.q_proj.input", "self_attn.key_cache"
MODEL |= {
    "norm_expanded": _parameter(_NORM, lambda t: t[:1].expand_as(t)),
    "norm_every_second": _parameter(_NORM, lambda t: torch.stack([t, t * 0], -1).flatten()[::2]),
    "norm_shorter": _parameter(_NORM, lambda t: t[:3].clone()),
    "norm_of_one": _parameter(_NORM, lambda t: t[:1].clone()),
    "norm_empty": _parameter(_NORM, lambda t: t[:0].clone()),
    "norm_of_doubles": _parameter(_NORM, lambda t: t.double()),
    "norm_of_two_dimensions": _parameter(_NORM, lambda t: t.unsqueeze(0).clone()),
    "bias_shorter": _parameter(_BIAS, lambda t: t[:3].clone()),
    "bias_expanded": _parameter(_BIAS, lambda t: t[:1].expand_as(t)),
    "bias_of_doubles": _parameter(_BIAS, lambda t: t.double()),
    "bias_empty": _parameter(_BIAS, lambda t: t[:0].clone()),
    "tables_of_three_levels": _parameter(f"{_INPUT}.act_levels", lambda t: t[:, :3].clone()),
    "tables_of_many_levels": _parameter(f"{_INPUT}.act_levels", lambda t: torch.arange(256, dtype=torch.uint8).repeat(2, 1)),
    "tables_of_large_levels": _parameter(f"{_INPUT}.act_levels", lambda t: t + 128),
    "tables_of_one": _parameter(f"{_INPUT}.act_levels", lambda t: t[:1].clone()),
    "tables_of_three": _parameter(f"{_INPUT}.act_levels", lambda t: t[[0, 1, 1]].clone()),
    "tables_of_none": _parameter(f"{_INPUT}.act_levels", lambda t: t[:0].clone()),
    "zeros_of_one": _parameter(f"{_INPUT}.act_zero", lambda t: t[:1].clone()),
    "clip_shorter": _parameter(f"{_INPUT}.act_clip", lambda t: t[:1].clone()),
    "clip_of_one_side": _parameter(f"{_INPUT}.act_clip", lambda t: t[:, :1].clone()),
    "cached_of_three_levels": _parameter(f"{_CACHED}.act_levels", lambda t: t[:, :3].clone()),
    "cached_of_many_levels": _parameter(f"{_CACHED}.act_levels", lambda t: torch.arange(32, dtype=torch.uint8).repeat(2, 1)),
    "cached_of_large_levels": _parameter(f"{_CACHED}.act_levels", lambda t: t + 128),
}
# Numbers that say what a module's tensors are, and that nobody edits: it is enough that nothing is read past its end.
MODEL_NUMBERS: dict[str, Case] = {
    "cached_size_larger": changed(lambda layer: setattr(layer.self_attn.key_cache, "size", 64)),
    "cached_size_odd": changed(lambda layer: setattr(layer.self_attn.value_cache, "size", 3)),
    "input_size_larger": changed(lambda layer: setattr(layer.self_attn.q_proj.input, "size", 4096)),
    "input_size_of_one": changed(lambda layer: setattr(layer.self_attn.q_proj.input, "size", 1)),
    "input_size_of_none": changed(lambda layer: setattr(layer.self_attn.q_proj.input, "size", 0)),
    "other_head_dim": changed(lambda layer: setattr(layer.self_attn, "head_dim", 32)),
    "other_layer_idx": changed(lambda layer: setattr(layer.self_attn, "layer_idx", 1)),
    "layer_idx_beyond": changed(lambda layer: setattr(layer.self_attn, "layer_idx", 9)),
    "features_changed": changed(lambda layer: setattr(layer.mlp.down_proj, "in_features", 9)),
}
