"""What a caller does to a loaded model: edits, copies, hooks, threads, caches of his own. It counts, or it is refused by name."""

import copy
import sys
import threading

import pytest
import torch
from packed_models import TIPPED, difference, ids, load
from torch import nn
from transformers import DynamicCache

import lbllm_cli.hf
from lbllm_cli.core.errors import RunError
from lbllm_cli.engine.abi import library
from lbllm_cli.engine.location import library_path
from lbllm_cli.runtime.attachments import attach
from lbllm_cli.runtime.cpu import block as kernel_block
from lbllm_cli.runtime.cpu.unit import Unit
from lbllm_cli.runtime.kv_cache import QuantizedKVCache
from lbllm_cli.runtime.quantizer import ActQuantizer
from lbllm_cli.training.knees import Shape, tables_of

if library_path() is None:
    pytest.skip("this installation has no compiled kernels", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(params=["auto", "off"])
def model(request, export_of):
    """A W(1+1)A4KV4 model through the kernels, and in torch."""
    return load(export_of("llama-tied"), request.param)


@pytest.fixture
def stepping(export_of):
    """A model through the kernels, whose decode steps are one call."""
    return load(export_of("llama-tied"))


@pytest.fixture
def library_steps(monkeypatch) -> list[int]:
    """Grows by one with every block step that the library computes."""
    calls: list[int] = []

    class Counting:
        def __getattr__(self, name):
            if name == "lbllm_block_step":
                calls.append(1)
            return getattr(library(), name)

    monkeypatch.setattr(kernel_block, "library", Counting)
    return calls


def prefilled(model, tokens: torch.Tensor) -> QuantizedKVCache:
    cache = QuantizedKVCache(model)
    model(tokens, past_key_values=cache)
    return cache


# Caches


@pytest.mark.parametrize("rows", [3, 16])
def test_a_cache_of_other_rows_is_refused_and_a_repeated_one_goes_on(model, rows):
    prefix, following = ids(1, 20), ids(rows, 1, seed=5)
    with pytest.raises(ValueError, match=rf"holds 1 rows, this pass has {rows}; repeat it first"):
        model(following, past_key_values=prefilled(model, prefix))
    cache = prefilled(model, prefix)
    cache.batch_repeat_interleave(rows)
    together = model(following, past_key_values=cache).logits[:, 0]
    whole = model(torch.cat([prefix.expand(rows, -1), following], 1), use_cache=False).logits[:, -1]
    assert difference(together, whole) < TIPPED
    with pytest.raises(ValueError, match=f"holds {rows} rows, this pass has 2"):
        model(ids(2, 1), past_key_values=cache)


def test_generate_with_a_prefix_for_several_rows(model):
    prefix = ids(1, 12)
    prompts = torch.cat([prefix.expand(4, -1), ids(4, 3, seed=6)], 1)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with pytest.raises(ValueError, match="repeat it first"):
        model.generate(prompts, past_key_values=prefilled(model, prefix), **options)
    cache = prefilled(model, prefix)
    cache.batch_repeat_interleave(4)
    assert model.generate(prompts, past_key_values=cache, **options).shape == (4, 19)


@pytest.mark.parametrize("spoil", ["fewer heads", "shorter records", "values shorter than keys", "another model's"])
def test_a_cache_that_is_not_the_models_is_refused(model, spoil):
    cache = prefilled(model, ids(2, 20))
    for layer in cache.layers:
        if spoil == "fewer heads":
            layer.keys, layer.values = layer.keys[:, :1], layer.values[:, :1]
        elif spoil == "shorter records":
            layer.keys, layer.values = layer.keys[..., :-1], layer.values[..., :-1]
        elif spoil == "values shorter than keys":
            layer.values = layer.values[:, :, :-1]
        else:
            layer.keys_by = ActQuantizer(tables_of([Shape(3, 4, 4, 4, 2, 2)], torch.device("cpu")), layer.keys_by.size)
    with pytest.raises(ValueError, match=r"not this layer's|other quantizers"):
        model(ids(2, 1), past_key_values=cache)


def test_a_cache_of_another_number_of_blocks_is_refused(model):
    cache = prefilled(model, ids(1, 5))
    cache.layers.pop()
    with pytest.raises(ValueError, match="has 2 layers, the model 3"):
        model(ids(1, 1), past_key_values=cache)


def test_a_callers_cache_follows_the_switch(model):
    tokens = ids(2, 24)
    lbllm_cli.hf.quantize_activations(model, False)
    own, plain = QuantizedKVCache(model), DynamicCache(config=model.config)
    for piece in (tokens[:, :20], *tokens[:, 20:].split(1, 1)):
        mine = model(piece, past_key_values=own).logits
        its = model(piece, past_key_values=plain).logits
        assert torch.equal(mine, its)
    lbllm_cli.hf.quantize_activations(model, True)
    with pytest.raises(ValueError, match="in full precision, and quantization was switched on since"):
        model(ids(2, 1), past_key_values=own)
    cache = prefilled(model, tokens)
    lbllm_cli.hf.quantize_activations(model, False)
    for count in (1, 2):
        with pytest.raises(ValueError, match="in codes, and quantization was switched off since"):
            model(ids(2, count), past_key_values=cache)


# Inputs and outputs


def test_linears_of_one_input_share_what_is_worked_out_of_it(stepping, monkeypatch):
    runs = []
    real = Unit.run
    monkeypatch.setattr(Unit, "run", lambda unit, x: runs.append(unit) or real(unit, x))
    stepping(ids(2, 9), use_cache=False)
    assert len(runs) == 4 * 3  # q k v, o, gate up, down of three blocks


def test_an_input_changed_in_place_is_read_again(model):
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        linear = model.model.layers[0].get_submodule(name)
        x = torch.randn(3, linear.in_features, generator=torch.Generator().manual_seed(1))
        first = linear(x)
        x.mul_(-2.0)
        assert torch.equal(linear(x), linear(x.clone()))
        assert not torch.equal(linear(x), first)
        linear(x).zero_()
        assert torch.equal(linear(x), linear(x.clone()))


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
def test_a_hook_that_changes_its_input_in_place_is_heard(export_of, name):
    def quartered(_, args):
        args[0].mul_(0.25)

    found = []
    for choice in ("auto", "off"):
        model = load(export_of("llama-tied"), choice)
        attention = model.model.layers[1].self_attn
        before = model(ids(1, 9), use_cache=False).logits
        # Ahead of quantization, as a hook that is there before it would be.
        handle = getattr(attention, name).register_forward_pre_hook(quartered, prepend=True)
        found.append(model(ids(1, 9), use_cache=False).logits)
        assert difference(found[-1], before) > TIPPED
        handle.remove()
    assert difference(*found) < TIPPED


def test_editing_an_output_leaves_the_others_and_the_next_pass(model):
    attention = model.model.layers[0].self_attn
    before = model(ids(1, 9), use_cache=False).logits
    handle = attention.q_proj.register_forward_hook(lambda _, args, out: out.zero_())
    edited = model(ids(1, 9), use_cache=False).logits
    assert torch.equal(edited, model(ids(1, 9), use_cache=False).logits)
    handle.remove()
    assert torch.equal(model(ids(1, 9), use_cache=False).logits, before)


def test_threads_pass_through_one_model_side_by_side(model):
    inputs = [ids(1, 4 + row, seed=row) for row in range(4)]
    alone = [model(tokens, use_cache=False).logits for tokens in inputs]
    wrong: list[object] = []

    def work(row: int) -> None:
        with torch.no_grad():
            for _ in range(8):
                try:
                    if not torch.equal(model(inputs[row], use_cache=False).logits, alone[row]):
                        wrong.append(row)
                except Exception as error:
                    wrong.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(row,)) for row in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []


# Edits


class Doubled(nn.Module):
    """A linear whose output counts twice, as an adapter would wrap it."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.inner(x)


def _wrap(model) -> None:
    model.model.layers[1].mlp.down_proj = Doubled(model.model.layers[1].mlp.down_proj)


def _replace_norm(model) -> None:
    norm = copy.deepcopy(model.model.layers[1].input_layernorm)
    norm.weight = nn.Parameter(3 * norm.weight, requires_grad=False)
    model.model.layers[1].input_layernorm = norm


def _replace_weight(model) -> None:
    model.model.layers[1].post_attention_layernorm.weight = nn.Parameter(torch.full((80,), 2.5), requires_grad=False)


def _scale_norm(model) -> None:
    model.model.layers[1].input_layernorm.weight.mul_(3)


def _scale_data(model) -> None:
    model.model.layers[1].post_attention_layernorm.weight.data.mul_(3)


def _stride_norm(model) -> None:
    twice = torch.stack([torch.full((80,), 2.5), torch.zeros(80)], 1)
    model.model.layers[1].post_attention_layernorm.weight = nn.Parameter(twice.flatten()[::2], requires_grad=False)


def _epsilon(model) -> None:
    model.model.layers[1].input_layernorm.variance_epsilon = 10.0


def _scaling(model) -> None:
    model.model.layers[1].self_attn.scaling *= 4


def _activation(model) -> None:
    model.model.layers[1].mlp.act_fn = nn.ReLU()


def _method(model) -> None:
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x, real=mlp.forward: 2 * real(x)


def _clip(model) -> None:
    model.model.layers[1].mlp.down_proj.input.act_clip.floor_divide_(8)


_EDITS = [
    _wrap, _replace_norm, _replace_weight, _scale_norm, _scale_data, _stride_norm, _epsilon, _scaling,
    _activation, _method, _clip,
]  # fmt: skip


@pytest.mark.parametrize("edit", _EDITS)
@pytest.mark.parametrize("stepped", [True, False], ids=["after steps", "before any"])
def test_decode_steps_see_what_a_full_pass_sees(stepping, edit, stepped):
    tokens = ids(2, 22)
    if stepped:
        stepping(tokens[:, 20:21], past_key_values=prefilled(stepping, tokens[:, :20]))
    before = stepping(tokens, use_cache=False).logits[:, -1]
    edit(stepping)
    whole = stepping(tokens, use_cache=False).logits[:, -1]
    assert difference(whole, before) > 2 * TIPPED
    cache = prefilled(stepping, tokens[:, :20])
    stepping(tokens[:, 20:21], past_key_values=cache)
    assert difference(stepping(tokens[:, 21:], past_key_values=cache).logits[:, -1], whole) < TIPPED


def test_steps_stay_in_the_library_where_it_can_follow(stepping, library_steps):
    tokens = ids(1, 21)
    for edit, expected in ((lambda _: None, 3), (_scale_norm, 3), (_clip, 3), (_wrap, 2)):
        edit(stepping)
        cache = prefilled(stepping, tokens[:, :20])
        library_steps.clear()
        stepping(tokens[:, 20:], past_key_values=cache)
        assert len(library_steps) == expected


def test_biases_are_read_as_they_are(export_of):
    model, tokens = load(export_of("qwen2-biases")), ids(1, 22)
    before = model(tokens, use_cache=False).logits[:, -1]
    model.model.layers[1].self_attn.k_proj.bias.data.add_(3)
    model.model.layers[1].self_attn.v_proj.bias = nn.Parameter(torch.ones(40), requires_grad=False)
    whole = model(tokens, use_cache=False).logits[:, -1]
    assert difference(whole, before) > TIPPED
    last = model(tokens[:, 21:], past_key_values=prefilled(model, tokens[:, :21])).logits[:, -1]
    assert difference(last, whole) < TIPPED


def test_a_norm_of_another_width_is_refused_and_not_read_beyond(stepping):
    tokens = ids(1, 21)
    cache = prefilled(stepping, tokens[:, :20])
    norm = stepping.model.layers[1].input_layernorm
    norm.weight = nn.Parameter(norm.weight[:3].clone(), requires_grad=False)
    with pytest.raises(RuntimeError, match="size of tensor"):
        stepping(tokens[:, 20:], past_key_values=cache)


def test_a_head_of_fewer_rows_is_read_no_further(export_of):
    model = load(export_of("llama-untied"), dtype=torch.bfloat16)
    whole = model(ids(1, 3)).logits
    model.lm_head.weight = nn.Parameter(model.lm_head.weight[:5].clone(), requires_grad=False)
    torch.testing.assert_close(model(ids(1, 3)).logits, whole[..., :5])


# Copies


def test_a_copy_is_bound_to_itself(model):
    tokens = ids(1, 21)
    expected = model(tokens).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(tokens).logits, expected)
    lbllm_cli.hf.quantize_activations(twin, False)
    assert torch.equal(model(tokens).logits, expected)
    full = twin(tokens).logits
    assert difference(full, expected) > 1e-3
    lbllm_cli.hf.quantize_activations(model, False)
    lbllm_cli.hf.quantize_activations(twin, True)
    assert torch.equal(twin(tokens).logits, expected)
    assert torch.equal(model(tokens).logits, full)


def test_a_copy_sees_its_own_edits_in_steps(stepping, library_steps):
    tokens = ids(1, 21)
    twin = copy.deepcopy(stepping)
    twin(tokens[:, 20:], past_key_values=prefilled(twin, tokens[:, :20]))
    assert len(library_steps) == 3
    again = copy.deepcopy(stepping)
    _wrap(again)
    last = again(tokens[:, 20:], past_key_values=prefilled(again, tokens[:, :20])).logits[:, -1]
    assert difference(last, again(tokens, use_cache=False).logits[:, -1]) < TIPPED
    # A model that was edited first keeps its edits.
    _wrap(twin)
    third = copy.deepcopy(twin)
    last = third(tokens[:, 20:], past_key_values=prefilled(third, tokens[:, :20])).logits[:, -1]
    assert difference(last, third(tokens, use_cache=False).logits[:, -1]) < TIPPED


# Attachment points


def test_a_quantizer_that_a_pass_does_not_reach_is_an_error(model):
    packed = model.model.layers[2].mlp.down_proj
    dense = nn.Linear(packed.in_features, packed.out_features, bias=False)
    model.model.layers[2].mlp.down_proj = dense
    with pytest.raises(RunError, match=r"block 2: a pass did not come through the quantizers of mlp\.down_proj\.input"):
        model(ids(1, 5), use_cache=False)
    lbllm_cli.hf.quantize_activations(model, False)
    model(ids(1, 5), use_cache=False)


def test_keys_and_values_that_pass_by_are_an_error(model, monkeypatch):
    attention = type(model.model.layers[0].self_attn)
    real = attention.forward

    # As a transformers would do it that hands its cache over by another name.
    def renamed(self, hidden_states, position_embeddings, attention_mask=None, cache=None, **kwargs):
        kwargs = {name: value for name, value in kwargs.items() if name != "past_key_values"}
        return real(self, hidden_states, position_embeddings, attention_mask, **kwargs)

    monkeypatch.setattr(attention, "forward", renamed)
    for options in ({"use_cache": False}, {"use_cache": True}):
        with pytest.raises(RunError, match=r"block 0: .* self_attn\.key_cache, self_attn\.value_cache"):
            model(ids(1, 5), **options)


def test_an_attention_that_takes_no_known_cache_is_refused_by_name(model, monkeypatch):
    attention = type(model.model.layers[0].self_attn)
    monkeypatch.setattr(attention, "forward", lambda self, hidden_states, memory=None: None)
    layer = model.model.layers[0]
    with pytest.raises(RunError, match=r"LlamaAttention .* takes no cache by a known name: .* got hidden_states, memory"):
        attach(layer, (), {name: module for name, module in layer.named_modules() if isinstance(module, ActQuantizer)})
