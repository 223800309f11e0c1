"""Whole models through the compiled kernels against the same models in torch: prefill, decode, cache, batches, files."""

import copy
from pathlib import Path

import pytest
import torch
from conftest import TOY
from packed_models import ROUNDING, TIPPED, both, difference, exported, ids, load, steps
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AttentionInterface, AutoTokenizer
from transformers.models.llama.modeling_llama import eager_attention_forward

import lbllm_cli.hf
from lbllm_cli.data.sources import builtin_records
from lbllm_cli.engine.location import library_path
from lbllm_cli.runtime.cpu.block import BlockStep
from lbllm_cli.runtime.cpu.head import HeadLinear
from lbllm_cli.runtime.kv_cache import QuantizedKVCache, RecordLayer
from lbllm_cli.runtime.linear import PackedLinear

if library_path() is None:
    pytest.skip("this installation has no compiled kernels", allow_module_level=True)

GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
_PAIRS: dict[Path, tuple] = {}


# Families whose decode step is one call; tests/integration/test_families.py has all others.
STEPPED = ("llama-tied", "llama-untied", "mistral-sliding", "qwen2-biases", "qwen2-sliding", "qwen3", "seed-oss")


@pytest.fixture(params=STEPPED)
def export(request, export_of) -> Path:
    """An exported toy of each family: Llama with fewer key heads, Qwen2 with biases, Qwen3 with norms, sliding windows."""
    return export_of(request.param)


@pytest.fixture
def pair(export):
    """A family's model through the kernels and in torch, for tests that leave both as they are."""
    if export not in _PAIRS:
        _PAIRS.clear()
        _PAIRS[export] = both(export)
    return _PAIRS[export]


@pytest.fixture
def llama(export_of) -> Path:
    """One export, for what does not depend on the family."""
    return export_of("llama-tied")


@pytest.fixture(params=["llama-tied", "qwen2-biases"])
def some(request, export_of) -> Path:
    """With biases and without."""
    return export_of(request.param)


@torch.no_grad()
def test_prefill_and_decode_are_those_of_torch(pair):
    model, plain = pair
    assert any(isinstance(vars(layer).get("forward"), BlockStep) for layer in model.model.layers)
    tokens = ids(2, 34, 4)
    (mine, cache), (theirs, its) = steps(model, tokens, 23), steps(plain, tokens, 23)
    apart = [difference(a, b) for a, b in zip(mine, theirs, strict=True)]
    # Measured: 3e-7 at most; with other tokens an edge is crossed in some passes.
    assert max(apart) < TIPPED
    agree = (torch.cat(mine, 1).argmax(-1) == torch.cat(theirs, 1).argmax(-1)).float().mean()
    assert agree > 0.9  # measured 0.99 and 1.0
    assert isinstance(cache, QuantizedKVCache)
    assert cache.nbytes == its.nbytes
    for layer, other in zip(cache.layers, its.layers, strict=True):
        assert layer.get_seq_length() == other.get_seq_length()
        assert layer.keys.shape == other.keys.shape


@torch.no_grad()
def test_a_decode_step_is_torchs_over_the_same_cache(pair):
    """One step from equal records, several times over: most agree to rounding, though a value may go over an edge in some."""
    model, plain = pair
    apart, stepped = [], 0
    for seed in range(5):
        tokens = ids(1 + seed % 3, 21, seed)
        its = plain(tokens[:, :20]).past_key_values
        cache = copy.deepcopy(its)
        mine, theirs = (each(tokens[:, 20:], past_key_values=kept).logits for each, kept in ((model, cache), (plain, its)))
        apart.append(difference(mine, theirs))
        for number, (layer, other) in enumerate(zip(cache.layers, its.layers, strict=True)):
            stepped += isinstance(layer, RecordLayer)
            for records, wanted in ((layer.keys, other.keys), (layer.values, other.values)):
                assert records.shape == wanted.shape
                assert torch.equal(records[:, :, :-1], wanted[:, :, :-1])
                same = (records == wanted)[:, :, -1].float().mean()
                # Later layers see what went over an edge before them. Measured 1.0 in the first layer.
                assert same > (0.97 if number == 0 else 0.5)
    assert stepped or "mistral" in model.config.model_type
    assert sorted(apart)[2] < ROUNDING  # measured 2e-7 to 3.5e-7
    assert max(apart) < TIPPED


@torch.no_grad()
def test_bfloat16_costs_no_more_than_in_torch(some):
    tokens = ids(2, 30)
    mine, theirs = both(some, dtype=torch.bfloat16)
    assert type(mine.get_output_embeddings()) is HeadLinear
    logits = [torch.cat(steps(each, tokens, 16)[0], 1) for each in (mine, theirs, load(some, "off", dtype=torch.float32))]
    assert logits[0].dtype == torch.bfloat16
    exact = logits[2]
    # A decode step keeps float32 inside a block; torch rounds after every operation.
    assert difference(logits[0].float(), exact) < 1.15 * difference(logits[1].float(), exact)  # measured 0.21 against 0.22


@torch.no_grad()
def test_a_padded_batch_gives_what_its_rows_give_alone_and_what_torch_gives(pair):
    model, plain = pair
    long, short = ids(1, 12, 1), ids(1, 7, 2)
    padded = torch.cat([torch.cat([torch.zeros(1, 5, dtype=torch.long), short], 1), long])
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    together = model.generate(padded, attention_mask=mask, **GREEDY)[:, 12:]
    alone = [model.generate(row, attention_mask=torch.ones_like(row), **GREEDY)[:, row.shape[1] :] for row in (short, long)]
    assert (together == torch.cat(alone)).float().mean() > 0.8  # measured 1.0
    assert (together == plain.generate(padded, attention_mask=mask, **GREEDY)[:, 12:]).float().mean() > 0.8  # measured 1.0
    # The mask matters: padding that is seen changes the first step.
    seen = model(padded[:, :11]).logits, model(padded[:, :11], attention_mask=mask[:, :11])
    assert not torch.equal(seen[0][0], seen[1].logits[0])
    step, where = padded[:, 11:], torch.tensor([[6], [11]])
    masked, unmasked = (
        model(step, attention_mask=m, past_key_values=copy.deepcopy(seen[1].past_key_values), position_ids=where)
        for m in (mask, torch.ones_like(mask))
    )
    assert difference(unmasked.logits[0], masked.logits[0]) > 1e-3
    assert difference(unmasked.logits[1], masked.logits[1]) < ROUNDING


@torch.no_grad()
def test_beams_crops_and_repeats(pair):
    model, plain = pair
    prompt = ids(1, 9)
    beams = [each.generate(prompt, num_beams=3, **GREEDY) for each in (model, plain)]
    assert (beams[0] == beams[1]).float().mean() > 0.5  # measured 0.76 to 1: one code that goes the other way moves all logits
    if any(layer.is_sliding for layer in QuantizedKVCache(model).layers):
        return
    tokens = ids(2, 30)
    pieces, cache = steps(model, tokens, 20)
    cache.crop(-8)
    for position in range(22, 30):
        again = model(tokens[:, position : position + 1], past_key_values=cache).logits
        torch.testing.assert_close(again, pieces[position - 19], rtol=1e-4, atol=1e-4)
    # Another continuation of the same beginning, in the same memory.
    cache.crop(-8)
    other = ids(2, 1, seed=9)
    fresh = steps(model, torch.cat([tokens[:, :22], other], 1), 20)[0][-1]
    torch.testing.assert_close(model(other, past_key_values=cache).logits, fresh, rtol=1e-4, atol=1e-4)
    cache.batch_repeat_interleave(2)
    next_token = ids(2, 1, seed=10)
    repeated = model(next_token.repeat_interleave(2, 0), past_key_values=cache).logits
    assert torch.equal(repeated[0], repeated[1])
    assert not torch.equal(repeated[0], repeated[2])


@torch.no_grad()
def test_a_copied_cache_goes_its_own_way(llama):
    model, tokens = load(llama), ids(1, 24)
    _, cache = steps(model, tokens, 20)
    twin = copy.deepcopy(cache)
    before = [layer.keys.clone() for layer in cache.layers]
    model(ids(1, 1, seed=8), past_key_values=twin)
    assert twin.get_seq_length() == 25
    assert all(torch.equal(layer.keys, kept) for layer, kept in zip(cache.layers, before, strict=True))
    model(ids(1, 1, seed=9), past_key_values=cache)
    assert not torch.equal(twin.layers[0].keys[:, :, -1], cache.layers[0].keys[:, :, -1])


@torch.no_grad()
def test_the_cache_grows_beyond_its_first_room(llama):
    """The first room is for 256 tokens."""
    model, plain = both(llama)
    tokens = ids(2, 290)
    _, cache = steps(model, tokens[:, :270], 250)
    keys = cache.layers[0].keys
    assert keys.shape[2] == 270
    assert keys.untyped_storage().nbytes() > keys.nbytes, "there is room for more"
    # A pass of several tokens in between, by torch.
    model(tokens[:, 270:280], past_key_values=cache)
    for position in range(280, 290):
        last = model(tokens[:, position : position + 1], past_key_values=cache).logits
    assert cache.get_seq_length() == 290
    its = plain(tokens).past_key_values
    for layer, other in ((cache.layers[0].keys, its.layers[0].keys), (cache.layers[0].values, its.layers[0].values)):
        assert (layer == other).float().mean() > 0.99  # measured 1.0
    assert difference(last, plain(tokens).logits[:, -1:]) < TIPPED


@torch.no_grad()
def test_one_row_of_a_batch_decodes_as_it_does_alone(llama):
    model, tokens = load(llama), ids(5, 26)
    together = torch.cat(steps(model, tokens, 20)[0], 1)
    for row in (0, 4):
        alone = torch.cat(steps(model, tokens[row : row + 1], 20)[0], 1)
        assert difference(alone, together[row : row + 1]) < TIPPED


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
@torch.no_grad()
def test_hooks_inside_a_block_are_called_in_decode_too(llama, register):
    model, tokens = load(llama), ids(1, 21)
    cache = model(tokens[:, :20]).past_key_values
    seen = []
    handle = getattr(model.model.layers[1].mlp, register)(lambda *_: seen.append(1))
    hooked = model(tokens[:, 20:], past_key_values=copy.deepcopy(cache)).logits
    assert seen == [1]
    handle.remove()
    assert difference(model(tokens[:, 20:], past_key_values=cache).logits, hooked) < TIPPED
    assert seen == [1]


@torch.no_grad()
def test_files_and_state_are_those_of_a_model_in_torch(some, tmp_path):
    model, plain = both(some)
    state, wanted = model.state_dict(), plain.state_dict()
    assert list(state) == list(wanted)
    for name, tensor in wanted.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor), name
    for name, each in (("kernels", model), ("torch", plain)):
        each.save_pretrained(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "torch").iterdir())
    assert sorted(path.name for path in (tmp_path / "kernels").iterdir()) == files
    for file in files:
        saved, expected = ((tmp_path / name / file) for name in ("kernels", "torch"))
        if file.endswith(".safetensors"):
            tensors = load_file(saved)
            assert {key: (t.dtype, t.shape) for key, t in tensors.items()} == {
                key: (t.dtype, t.shape) for key, t in load_file(expected).items()
            }
            assert all(torch.equal(tensors[key], t) for key, t in load_file(expected).items())
        else:
            assert saved.read_bytes() == expected.read_bytes()
    tokens = ids(2, 20)
    assert torch.equal(load(tmp_path / "kernels")(tokens).logits, model(tokens).logits)


@torch.no_grad()
def test_casts_copies_and_dequantize(some):
    model, plain = both(some)
    tokens = ids(2, 20)
    expected, scales = model(tokens).logits, {name: t for name, t in plain.state_dict().items() if name.endswith(".scale")}
    twin = copy.deepcopy(model)
    assert torch.equal(twin(tokens).logits, expected)
    cache = twin(tokens[:, :19]).past_key_values
    assert difference(twin(tokens[:, 19:], past_key_values=cache).logits, expected[:, -1:]) < TIPPED
    for cast in (torch.bfloat16, torch.float16):
        state = twin.to(cast).state_dict()
        assert all(torch.equal(state[name], scale) for name, scale in scales.items())
        assert twin(tokens).logits.dtype == cast
        cache = twin(tokens[:, :19]).past_key_values
        assert bool(torch.isfinite(twin(tokens[:, 19:], past_key_values=cache).logits).all())
    model.dequantize()
    lbllm_cli.hf.quantize_activations(plain, False)
    assert not [module for module in model.modules() if isinstance(module, PackedLinear)]
    torch.testing.assert_close(model(tokens).logits, plain(tokens).logits, rtol=1e-6, atol=1e-6)
    cache = model(tokens[:, :19]).past_key_values
    torch.testing.assert_close(
        model(tokens[:, 19:], past_key_values=cache).logits, plain(tokens).logits[:, -1:], rtol=1e-3, atol=1e-3
    )


@torch.no_grad()
def test_without_quantized_activations_weights_are_the_same(some):
    model, plain = both(some)
    tokens = ids(2, 20)
    for each in (model, plain):
        lbllm_cli.hf.quantize_activations(each, False)
    torch.testing.assert_close(model(tokens).logits, plain(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_perplexity_of_the_trained_toy(tmp_path):
    ptq = {"group_size": 64, "rounds": 0}
    data = {"calibration": {"sequences": 4, "length": 128}}
    folder = exported(tmp_path, TOY, ptq=ptq, data=data)
    text = next(builtin_records("evaluation", "novels"))["text"][:20_000]
    known = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]
    tokens = torch.tensor(known[2 * 16 * 128 : 3 * 16 * 128]).view(16, 128)
    found = [
        float(cross_entropy(each(tokens).logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten()).exp())
        for each in both(folder, dtype=torch.float32)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-3)  # measured 8e-4; 1e-4 to 2e-3 on others: an input at an edge
    assert found[1] < 60


def _halved(module, query, key, value, attention_mask, scaling=None, **others):
    return eager_attention_forward(module, query, key, value, attention_mask, scaling=scaling / 2, **others)


@torch.no_grad()
def test_an_attention_that_somebody_has_registered_is_torchs(llama):
    AttentionInterface.register("halved", _halved)
    mine, theirs, plain = (load(llama, kernels) for kernels in ("auto", "off", "auto"))
    cached = [each(ids(1, 11)).past_key_values for each in (mine, theirs, plain)]
    for each in (mine, theirs):
        each.set_attn_implementation("halved")
    found = [each(ids(1, 1, 3), past_key_values=cache).logits for each, cache in zip((mine, theirs, plain), cached, strict=True)]
    assert difference(found[0], found[1]) < ROUNDING
    assert difference(found[0], found[2]) > 100 * ROUNDING


@torch.no_grad()
def test_a_mask_of_its_own_for_every_head_is_torchs(llama):
    mine, theirs = both(llama)
    found = []
    for each in (mine, theirs):
        cache = each(ids(1, 11)).past_key_values
        mask = torch.zeros(1, 4, 1, 12)
        mask[:, 1:, :, :8] = torch.finfo(torch.float32).min
        found.append(each(ids(1, 1, 3), past_key_values=cache, attention_mask=mask, position_ids=torch.tensor([[11]])).logits)
    assert difference(*found) < ROUNDING


@pytest.mark.parametrize("strict", [True, False])
@torch.no_grad()
def test_weights_of_another_model_are_loaded_as_a_whole(export_of, strict):
    """Those that the library holds as well; the linears run in torch from then on."""
    folder = export_of("llama-tied")
    first, second = (load(folder, "auto") for _ in range(2))
    state = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    name = "model.layers.0.mlp.down_proj.weight"
    state[name] = 255 - state[name]
    missing, unexpected = second.load_state_dict(state, strict=strict)
    assert not missing
    assert not unexpected
    assert torch.equal(second.state_dict()[name], state[name])
    plain = load(folder, "off")
    plain.load_state_dict(state)
    assert difference(second(ids(1, 9)).logits, plain(ids(1, 9)).logits) < ROUNDING
    assert difference(first(ids(1, 9)).logits, plain(ids(1, 9)).logits) > ROUNDING
