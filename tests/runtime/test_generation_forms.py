"""What transformers offers around a model, on packed exports: the same tokens as plain `generate`, or a refusal by name."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import lbllm_cli.hf

GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
TEXT = "The sea was calm, and the sea was"


@pytest.fixture(scope="module", params=["llama-tied", "gemma3"])
def family(request):
    """With full attention, and with windows that a text slides out of."""
    return request.param


@pytest.fixture(scope="module", params=["A4KV4", "A16"])
def model(request, export_of, family):
    found = AutoModelForCausalLM.from_pretrained(export_of(family)).eval()
    lbllm_cli.hf.quantize_activations(found, request.param == "A4KV4")
    return found


@pytest.fixture(scope="module")
def prompt(export_of, family):
    tokens = AutoTokenizer.from_pretrained(export_of(family))(f"{TEXT} {TEXT} {TEXT}", return_tensors="pt")["input_ids"]
    assert tokens.shape[1] > 20  # past the windows of the toy
    return tokens


@pytest.fixture(scope="module")
def wanted(model, prompt):
    return model.generate(prompt, **GREEDY)


@pytest.fixture(scope="module")
def source(export_of, family):
    """The full-precision model, which guesses otherwise."""
    return AutoModelForCausalLM.from_pretrained(export_of(family).parents[1] / "model").eval()


@pytest.mark.parametrize("where", ["cpu", {"": "cpu"}, "auto"])
def test_any_device_map(export_of, where):
    folder = export_of("llama-tied")
    prompt = torch.arange(1, 9)[None]
    plain, placed = (AutoModelForCausalLM.from_pretrained(folder, **options) for options in ({}, {"device_map": where}))
    assert torch.equal(placed.generate(prompt, **GREEDY), plain.generate(prompt, **GREEDY))


def test_a_device_map_with_a_disk_is_refused(export_of, tmp_path):
    where = dict.fromkeys(("model.layers", "model.norm", "model.rotary_emb"), "cpu")
    where |= dict.fromkeys(("model.embed_tokens", "lm_head"), "disk")
    with pytest.raises(ValueError, match="was left on disk by device_map, a packed model is in memory as a whole"):
        AutoModelForCausalLM.from_pretrained(export_of("llama-tied"), device_map=where, offload_folder=tmp_path)


def test_pipeline(export_of):
    folder = export_of("llama-tied")
    tokenizer, plain = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    (found,) = pipeline("text-generation", model=str(folder))(TEXT, **GREEDY)
    tokens = plain.generate(tokenizer(TEXT, return_tensors="pt")["input_ids"], **GREEDY)
    assert found["generated_text"] == tokenizer.decode(tokens[0], skip_special_tokens=True)


def test_assisted_by_another_model_and_by_the_prompt(model, prompt, wanted, source):
    """Guesses that are refused are taken back out of the cache."""
    assert not torch.equal(source.generate(prompt, **GREEDY), wanted)
    assert torch.equal(model.generate(prompt, assistant_model=source, **GREEDY), wanted)
    assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=3, **GREEDY), wanted)


def test_assisting_another_model(model, prompt, source):
    assert torch.equal(source.generate(prompt, assistant_model=model, **GREEDY), source.generate(prompt, **GREEDY))


def test_without_a_cache(model, prompt, wanted):
    assert torch.equal(model.generate(prompt, use_cache=False, **GREEDY), wanted)


def test_sampling_with_a_seed(model, prompt):
    def sampled(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return model.generate(prompt, **{**GREEDY, "do_sample": True, "temperature": 1.5, "top_k": 50, "top_p": 0.95})

    assert torch.equal(sampled(1), sampled(1))
    assert len({tuple(sampled(seed)[0].tolist()) for seed in range(4)}) > 1


def test_a_static_cache(model, prompt, wanted):
    """With keys and values in 4 bits there is only the model's own cache."""
    options = {"cache_implementation": "static", **GREEDY}
    if next(module for module in model.modules() if isinstance(module, lbllm_cli.hf.ActQuantizer)).enabled:
        with pytest.raises(ValueError, match="this model keeps keys and values in 4 bits"):
            model.generate(prompt, **options)
    else:
        assert torch.equal(model.generate(prompt, **options), wanted)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_torch_compile(model, prompt):
    with torch.no_grad():
        found = torch.compile(model, backend="aot_eager")(prompt).logits
        # Measured: 0.
        torch.testing.assert_close(found, model(prompt).logits, rtol=0, atol=1e-5)
    torch.compiler.reset()
