"""`model.generate` through the library as a whole against transformers' own loop over the same model; what is left to that."""

import copy
from functools import partial

import pytest
import torch
from packed_models import ROUNDING, TIPPED, difference, ids, load
from torch import nn
from transformers import AttentionInterface, AutoTokenizer, GenerationConfig, LogitsProcessorList
from transformers.models.llama.modeling_llama import eager_attention_forward

import lbllm_cli.hf
from lbllm_cli.engine.location import library_path
from lbllm_cli.engine.model import Session
from lbllm_cli.runtime.cpu.generate import NativeGenerate
from lbllm_cli.runtime.kv_cache import QuantizedKVCache

if library_path() is None:
    pytest.skip("this installation has no compiled kernels", allow_module_level=True)

GREEDY = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
WHOLE = ("llama-tied", "llama-untied", "qwen2-biases", "qwen3", "seed-oss")


@pytest.fixture
def runs(monkeypatch) -> list[int]:
    """Grows by the number of tokens of each call of the library."""
    calls: list[int] = []
    real = Session.run
    monkeypatch.setattr(Session, "run", lambda session, tokens: calls.append(len(tokens)) or real(session, tokens))
    return calls


@pytest.fixture
def model(export_of):
    return load(export_of("llama-tied"), dtype=torch.float32)


def by_transformers(model, *args, **kwargs):
    """What its own class generates."""
    return type(model).generate(model, *args, **kwargs)


def scores_of(generate, prompt: torch.Tensor, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and logits [steps, vocab] that they were chosen by, as they were handed over: nothing may write over them."""
    seen: list[torch.Tensor] = []
    note = LogitsProcessorList([lambda _, scores: seen.append(scores) or scores])
    return generate(prompt, logits_processor=note, **options), torch.cat(seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", WHOLE)
def test_it_generates_what_transformers_does_in_float32(family, dtype, export_of, runs):
    model = load(export_of(family), dtype=dtype)
    reference = load(export_of(family), dtype=torch.float32)
    for its, stored in zip(reference.parameters(), model.parameters(), strict=True):
        its.data.copy_(stored)
    same, apart = [], []
    for seed in range(4):
        prompt = ids(1, 20, seed)
        mine, scores = scores_of(model.generate, prompt, **GREEDY)
        theirs, wanted = scores_of(partial(by_transformers, reference), prompt, **GREEDY)
        assert mine.shape == theirs.shape == (1, 29)
        assert torch.equal(mine[:, :20], prompt)
        same.append(torch.equal(mine, theirs))
        apart.append(difference(scores[0], wanted[0]))
        assert torch.equal(scores.argmax(-1), mine[0, 20:])
    assert runs == [20, *[1] * 8] * 4
    # Measured: 3e-7, but where a code goes over an edge.
    assert sorted(apart)[1] < ROUNDING
    assert sum(same) >= 2


TAKEN = [
    {},
    {"do_sample": True, "temperature": 1.3, "top_k": 20, "top_p": 0.9},
    {"do_sample": True, "min_p": 0.02, "top_k": 0},
    {"repetition_penalty": 1.5},
    {"no_repeat_ngram_size": 2, "min_new_tokens": 3},
    {"attention_mask": torch.ones(1, 12, dtype=torch.int64)},
    {"generation_config": GenerationConfig(max_new_tokens=5, do_sample=True, top_k=3)},
    {"suppress_tokens": [1, 2, 3]},
]


@pytest.mark.parametrize("options", TAKEN)
def test_settings_of_one_text_are_those_of_transformers(model, runs, options):
    found = []
    for generate in (model.generate, partial(by_transformers, model)):
        torch.manual_seed(5)
        found.append(generate(ids(1, 12, seed=4), **(options if "generation_config" in options else GREEDY | options)))
    assert torch.equal(*found)
    assert runs[0] == 12


def test_it_stops_at_a_token_and_streams(model, runs):
    class Streamer:
        def __init__(self):
            self.seen, self.ended = [], 0

        def put(self, tokens):
            self.seen += tokens.flatten().tolist()

        def end(self):
            self.ended += 1

    prompt, streamer, varied = ids(1, 12), Streamer(), GREEDY | {"repetition_penalty": 9.0}
    whole = model.generate(prompt, **varied)
    third = int(whole[0, 14])
    assert third not in whole[0, :14]
    found = model.generate(prompt, streamer=streamer, **(varied | {"eos_token_id": third}))
    assert torch.equal(found, whole[:, :15])
    assert streamer.seen == found[0].tolist()
    assert streamer.ended == 1


def _cache(model) -> QuantizedKVCache:
    cache = QuantizedKVCache(model)
    model(ids(1, 11), past_key_values=cache)
    return cache


def _ending(model) -> dict:
    folder = model.config._name_or_path
    return {"stop_strings": ["sea"], "tokenizer": AutoTokenizer.from_pretrained(folder)}


LEFT = {
    "strings that end a text": _ending,
    "beams": lambda _: {"num_beams": 2},
    "several texts": lambda _: {"input_ids": ids(2, 12)},
    "several answers": lambda _: {"num_return_sequences": 2, "do_sample": True},
    "a padded text": lambda _: {"attention_mask": torch.tensor([[0] * 3 + [1] * 9])},
    "padding that transformers finds": lambda _: {"pad_token_id": int(ids(1, 12)[0, 0])},
    "more than tokens": lambda _: {"return_dict_in_generate": True},
    "no cache": lambda _: {"use_cache": False},
    "a caller's cache": lambda model: {"past_key_values": _cache(model)},
    "guesses of the prompt": lambda _: {"prompt_lookup_num_tokens": 2},
    "embeddings": lambda model: {"input_ids": None, "inputs_embeds": model.get_input_embeddings()(ids(1, 12))},
    "a default of the model": lambda model: model.generation_config.update(num_beams=2) or {},
}


@torch.no_grad()
@pytest.mark.parametrize("kind", LEFT)
def test_what_is_left_to_transformers(model, runs, kind):
    options = {"input_ids": ids(1, 12), **GREEDY, **LEFT[kind](model)}
    model.generate(**options)
    assert runs == []


class Doubled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


def _wrap(model) -> None:
    model.model.layers[1].mlp.down_proj = Doubled(model.model.layers[1].mlp.down_proj)


def _override(model) -> None:
    model.model.norm.forward = lambda x: 2 * x


def _fewer_rows(model) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight[:500].clone(), requires_grad=False)


def _stride(model) -> None:
    model.model.norm.weight = nn.Parameter(torch.linspace(0.5, 2, 160)[::2], requires_grad=False)


def _halved(module, query, key, value, attention_mask, scaling=None, **others):
    return eager_attention_forward(module, query, key, value, attention_mask, scaling=scaling / 2, **others)


def _halve(model) -> None:
    """Of an implementation that somebody has registered nobody knows what it computes."""
    AttentionInterface.register("halved", _halved)
    model.set_attn_implementation("halved")


EDITS = {
    "wrapped": _wrap,
    "overridden": _override,
    "a layer's own forward": lambda model: model.model.layers[0].__dict__.pop("forward"),
    "a hook on a layer": lambda model: model.model.layers[2].register_forward_hook(lambda *_: None),
    "a hook on the model": lambda model: model.register_forward_pre_hook(lambda *_: None),
    "a head of fewer rows": _fewer_rows,
    "training": lambda model: model.train(),
    "full activations": lambda model: lbllm_cli.hf.quantize_activations(model, False),
    "a strided norm": _stride,
    "another attention": _halve,
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_model_is_left_to_transformers(model, runs, edit):
    EDITS[edit](model)
    assert torch.equal(model.generate(ids(1, 12), **GREEDY), by_transformers(model, ids(1, 12), **GREEDY))
    assert runs == []


def test_changed_weights_are_followed(model, runs):
    before = scores_of(model.generate, ids(1, 12), **GREEDY)[1][0]
    with torch.no_grad():
        model.model.norm.weight.mul_(torch.linspace(0.2, 4, 80))
        model.model.layers[1].input_layernorm.weight.mul_(3)
        model.model.layers[0].mlp.down_proj.input.act_clip.floor_divide_(8)
    after = scores_of(model.generate, ids(1, 12), **GREEDY)[1][0]
    wanted = scores_of(partial(by_transformers, model), ids(1, 12), **GREEDY)[1][0]
    assert difference(after, before) > 2 * TIPPED
    assert difference(after, wanted) < TIPPED
    assert len(runs) == 18


def test_a_copy_generates_by_itself(model, runs):
    twin = copy.deepcopy(model)
    assert isinstance(twin.generate, NativeGenerate)
    assert twin.generate.model is twin
    wanted = model.generate(ids(1, 12), **GREEDY)
    assert torch.equal(twin.generate(ids(1, 12), **GREEDY), wanted)
    assert len(runs) == 18
    _wrap(twin)
    twin.generate(ids(1, 12), **GREEDY)
    assert len(runs) == 18
    assert torch.equal(model.generate(ids(1, 12), **GREEDY), wanted)


def test_sliding_windows_go_block_by_block(export_of):
    assert "generate" not in vars(load(export_of("mistral-sliding")))


def test_dense_weights_generate_by_transformers(export_of, runs):
    model = load(export_of("llama-tied"))
    dense = model.dequantize()
    assert "generate" not in vars(dense)
    dense.generate(ids(1, 12), **GREEDY)
    assert runs == []


def test_a_layer_that_the_configuration_does_not_have(model):
    model.config.num_hidden_layers = 2
    with pytest.raises(ValueError, match="zip"):
        model.generate(ids(1, 12), **GREEDY)


def test_tokens_that_the_model_does_not_have(model):
    with pytest.raises(ValueError, match="a token"):
        model.generate(torch.tensor([[5, 10**6]]), **GREEDY)
