"""Exports as GGUF: transformers' own reader of the format gets the checkpoint's weights and tokens back."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import TOY, save_toy, write_recipe
from stages import logits_of, refused, stage_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from lbllm_cli.core.errors import UsageError
from lbllm_cli.export.formats.gguf import blocks
from lbllm_cli.export.gguf.architectures import rope_factors, turned_rows
from lbllm_cli.export.gguf.vocabulary import Vocabulary
from lbllm_cli.format.level_table import unpack_places
from lbllm_cli.format.weights import PackedWeight, pack_codes

gguf = pytest.importorskip("gguf")
# Kernels add in another order than torch; here logits are compared bit for bit.
pytestmark = pytest.mark.usefixtures("in_torch")
FORM = "export.format=gguf"
# Blocks of Q8_0 have 32 numbers.
WHOLE = {"hidden_size": 128, "intermediate_size": 160, "head_dim": 32}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


@pytest.fixture
def exported(ok, tmp_path):
    """exported(family, **changes of the toy): source and export of its ptq stage."""

    def run(name: str, **changes):
        source = save_toy(tmp_path / "model", name, **{**WHOLE, **changes})
        recipe = write_recipe(tmp_path / "recipe.yaml", source, tmp_path / "run")
        ok("ptq", "--recipe", recipe)
        said = ok("export", "--recipe", recipe, FORM).stderr
        assert "weights are exact; llama.cpp rounds activations to 8 bits as it multiplies" in said
        assert f"gguf, {(tmp_path / 'run' / 'export' / 'model.gguf').stat().st_size:,} bytes of weights" in said
        return source, tmp_path / "run" / "export"

    return run


def fields(export) -> dict:
    return {name: field.contents() for name, field in gguf.GGUFReader(export / "model.gguf").fields.items()}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama-tied", {}),
        ("llama-untied", {"dtype": torch.bfloat16}),
        ("qwen2-biases", {}),
        # The reader takes these families' own head size whatever the file says.
        ("qwen3", {"head_dim": 128}),
        ("gemma3", {"head_dim": 256, "query_pre_attn_scalar": 256, "num_hidden_layers": 6, "layer_types": None}),
    ],
)
def test_transformers_computes_what_the_checkpoint_does(exported, tmp_path, name, changes):
    source, export = exported(name, **changes)
    model = AutoModelForCausalLM.from_pretrained(export, gguf_file="model.gguf", dtype=torch.float32)
    torch.testing.assert_close(logits_of(model), logits_of(stage_model(source, tmp_path / "run")), atol=0, rtol=0)


def test_tokens_kinds_and_the_template_come_back(exported, tmp_path):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    source = save_toy(tmp_path / "model", "llama-tied", **WHOLE)
    (source / "chat_template.jinja").write_text(template)
    _, export = exported("llama-tied")
    wanted, found = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(export, gguf_file="model.gguf")
    text = "The sea was calm, and 1234 ships.\n\n  A tab:\tend\n"
    assert found(text)["input_ids"] == wanted(text)["input_ids"]
    assert found.convert_ids_to_tokens(range(1024)) == wanted.convert_ids_to_tokens(range(1024))
    known = fields(export)
    assert known["tokenizer.chat_template"] == template
    assert known["tokenizer.ggml.bos_token_id"] == wanted.bos_token_id
    assert known["tokenizer.ggml.eos_token_id"] == wanted.eos_token_id
    assert known["tokenizer.ggml.add_bos_token"] == (wanted("a")["input_ids"][0] == wanted.bos_token_id)
    assert known["tokenizer.ggml.token_type"][wanted.eos_token_id] == gguf.TokenType.CONTROL


def test_scores_of_tokens_with_spaces_follow_the_merges(tmp_path):
    merges = [["a", "b"], ["\u2581", "ab"], ["\u2581a", "b"], ["c", "\u2581ab"]]
    vocab = ["<unk>", "<0x0A>", "\u2581", "a", "b", "c", "ab", "\u2581ab", "c\u2581ab"]
    values = {
        "model": {"type": "BPE", "byte_fallback": True, "unk_token": "<unk>", "merges": merges,
                  "vocab": {text: row for row, text in enumerate(vocab)}},
        "added_tokens": [{"id": 9, "content": "<bos>", "special": True}, {"id": 10, "content": "<x>", "special": False}],
        "pre_tokenizer": None, "normalizer": None,
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    vocabulary = Vocabulary(tmp_path, 12)
    texts, kinds = vocabulary.tokens()
    assert texts == [*vocab, "<bos>", "<x>", "[PAD11]"]
    kind = gguf.TokenType
    normal = [kind.NORMAL] * 7
    assert kinds == [kind.UNKNOWN, kind.BYTE, *normal, kind.CONTROL, kind.USER_DEFINED, kind.UNUSED]
    assert vocabulary.scores(texts)[6:9] == [0.0, -1.0, -3.0]
    assert vocabulary.scores(texts)[3] == -4.0


def test_a_model_in_the_hubs_cache_is_not_named_by_its_commit(tmp_path):
    from lbllm_cli.export.formats.gguf import _name

    assert _name(tmp_path / "models--people--Toy-1B" / "snapshots" / "0123abcd") == "Toy-1B"
    assert _name(tmp_path / "Toy-1B") == "Toy-1B"


@pytest.mark.parametrize(("size", "bits"), [(32, 8), (64, 8), (96, 8), (16, 2), (64, 2)])
def test_blocks_are_those_of_ggml(size, bits):
    generator = torch.Generator().manual_seed(size)
    codes = torch.randint(0, 4, (5, 160), dtype=torch.uint8, generator=generator)
    count = -(-160 // size)
    levels = torch.randint(-127, 128, (5, count, 4), dtype=torch.int8, generator=generator)
    scale = torch.rand(5, count, generator=generator).half()
    if bits == 2:
        levels = unpack_places(torch.randint(0, 256, (5, count, 1), dtype=torch.uint8, generator=generator))
        scale = scale[:, :1].expand(5, count)
    packed = PackedWeight(pack_codes(codes, size), levels, scale, 160, bits)
    found = blocks(packed)
    assert found.shape == (5, 170)
    for row in range(5):
        for column in range(160):
            block = found[row, column // 32 * 34 :][:34].numpy()
            value = float(np.frombuffer(block[:2].tobytes(), np.float16)[0]) * float(block[2:].view(np.int8)[column % 32])
            assert value == float(packed.values()[row, column])
    theirs = gguf.dequantize(found.numpy(), gguf.GGMLQuantizationType.Q8_0)
    assert torch.equal(torch.from_numpy(theirs), packed.values())


def test_rows_of_q_and_k_are_dealt_in_pairs():
    rows = turned_rows(12, 2).tolist()
    assert rows == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert sorted(turned_rows(64, 4).tolist()) == list(range(64))


def test_frequencies_of_llama3_are_divided_by_what_the_paper_says(exported):
    """The formula of the Llama 3.1 report, written out."""
    _, export = exported("llama-tied", rope_parameters=LLAMA3)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(export / "model.gguf").tensors}
    found = tensors["rope_freqs.weight"].data
    assert found.shape == (16,)
    for place in range(16):
        wave = 2 * math.pi * 10000.0 ** (2 * place / 32)
        smooth = (32 / wave - 1.0) / (4.0 - 1.0)
        wanted = 1.0 if wave < 32 / 4.0 else 8.0 if wave > 32 / 1.0 else 1 / ((1 - smooth) / 8.0 + smooth)
        assert found[place] == pytest.approx(wanted, rel=1e-5)  # measured 3e-7
    assert {1.0, 8.0} < set(found.round(4).tolist())


def test_frequencies_that_are_as_usual_have_no_factors(toy):
    from transformers import AutoConfig

    assert rope_factors(AutoConfig.from_pretrained(toy)) is None


@pytest.mark.parametrize(
    ("name", "changes", "sections", "message"),
    [
        ("olmo2", WHOLE, {}, "gguf is written for llama, qwen2, qwen3, gemma3_text, this is olmo2; take another format"),
        ("llama-tied", WHOLE, {"ptq": {"group_size": 48}}, "gguf has blocks of 32, which do not divide groups of 48"),
        ("llama-tied", {**WHOLE, "intermediate_size": 112}, {}, "gguf has blocks of 32, which do not divide rows of 112"),
        ("llama-tied", {**WHOLE, "attention_bias": True}, {}, "llama.cpp's llama has no biases of linears; take another format"),
        ("llama-tied", {**WHOLE, "hidden_act": "relu"}, {}, "llama.cpp's llama has no hidden_act relu; take another format"),
        ("gemma3", WHOLE, {}, "has no layer_types other than one full layer in 6, no query_pre_attn_scalar other than head_dim"),
        ("llama-tied", {**WHOLE, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, {},
         "llama.cpp's llama has no rope_type yarn"),
    ],
)  # fmt: skip
def test_what_a_file_cannot_hold_is_refused_by_name(ok, lbllm, tmp_path, name, changes, sections, message):
    source = save_toy(tmp_path / "model", name, **changes)
    recipe = write_recipe(tmp_path / "recipe.yaml", source, tmp_path / "run", **sections)
    ok("ptq", "--recipe", recipe)
    assert message in refused(lbllm, tmp_path / "run", "export", "--recipe", recipe, FORM)


@pytest.mark.parametrize(
    ("normalizer", "rule", "prepends"),
    [
        (None, None, False),
        ({"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}, {"type": "Split"}, False),
        ({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, {"type": "Replace"}]}, None, True),
        ({"type": "Prepend", "prepend": "\u2581"}, None, True),
        (None, {"type": "Metaspace", "prepend_scheme": "first"}, True),
        (None, {"type": "Metaspace", "prepend_scheme": "never"}, False),
    ],
)
def test_a_space_that_a_text_is_given_to_begin_with(tmp_path, normalizer, rule, prepends):
    model = {"type": "BPE", "byte_fallback": True, "vocab": {"a": 0}, "merges": []}
    values = {"model": model, "added_tokens": [], "normalizer": normalizer, "pre_tokenizer": rule}
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    assert Vocabulary(tmp_path, 4).prepends == prepends


def test_named_chat_templates_are_in_the_file(ok, tmp_path):
    source = save_toy(tmp_path / "model", **WHOLE)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    templates = {"default": "{{ messages[0].content }}", "tool_use": "tools {{ messages[0].content }}"}
    settings["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    recipe = write_recipe(tmp_path / "recipe.yaml", source, tmp_path / "run", ptq={"rounds": 0})
    for command in ("ptq", "export"):
        ok(command, "--recipe", recipe, FORM)
    found = fields(tmp_path / "run" / "export")
    assert found["tokenizer.chat_template"] == templates["default"]
    assert found["tokenizer.chat_template.tool_use"] == templates["tool_use"]
    assert "up to date" in ok("export", "--recipe", recipe, FORM).stderr
    (source / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "{{ messages[0].content }}!"}))
    assert "up to date" not in ok("export", "--recipe", recipe, FORM).stderr
    assert fields(tmp_path / "run" / "export")["tokenizer.chat_template"].endswith("!")


def test_what_an_end_to_end_phase_has_trained_is_in_the_file(ok, tmp_path):
    """Its norms, in blocks and behind them, as the dense export of the same checkpoint has them."""
    source = save_toy(tmp_path / "model", "gemma3", head_dim=256, query_pre_attn_scalar=256, num_hidden_layers=6,
                      layer_types=None, hidden_size=128, intermediate_size=160)  # fmt: skip
    phase = {"epochs": 0, "end_to_end": {"sequences": 8, "epochs": 1, "batch_size": 2, "lr_norms": 0.05}}
    recipe = write_recipe(tmp_path / "recipe.yaml", source, tmp_path / "run", ptq={"rounds": 0}, distill=phase)
    for stage in ("ptq", "distill"):
        ok(stage, "--recipe", recipe)
    logits = {}
    for form in ("dense", "gguf", "compressed-tensors"):
        ok("export", "--recipe", recipe, f"export.format={form}")
        options = {"gguf_file": "model.gguf"} if form == "gguf" else {}
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export", dtype=torch.float32, **options)
        logits[form] = logits_of(model)
    ok("export", "--recipe", recipe, "export.checkpoint=distill", "export.format=dense")
    before = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export", dtype=torch.float32))
    assert (before - logits["dense"]).abs().max() > 0.01
    torch.testing.assert_close(logits["compressed-tensors"], logits["dense"], atol=0, rtol=0)
    # The norms' offset is added in float32 and taken off again. Measured: 0.
    torch.testing.assert_close(logits["gguf"], logits["dense"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"added_tokens": [{"id": 1024, "content": "<x>", "special": True}]}, "has a token 1024, the model 1024"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "llama.cpp has no name for the pre_tokenizer of "),
        ({"model": {"type": "Unigram", "vocab": []}}, "has a model of type Unigram"),
    ],
)
def test_a_tokenizer_that_llama_cpp_has_no_name_for_is_refused(tmp_path, change, message):
    values = json.loads((TOY / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**values, **change}))
    with pytest.raises(UsageError, match=message):
        Vocabulary(tmp_path, 1024)


def test_another_export_takes_its_place_and_it_is_up_to_date_before(exported, ok, tmp_path):
    _, export = exported("llama-tied")
    recipe = tmp_path / "recipe.yaml"
    assert "export: up to date" in ok("export", "--recipe", recipe, FORM).stderr
    (export / "model.gguf").write_bytes(b"x")
    assert "up to date" not in ok("export", "--recipe", recipe, FORM).stderr
    # As a killed one leaves it.
    shutil.copytree(export, export.with_name("export.partial"))
    ok("export", "--recipe", recipe)
    assert sorted(file.name for file in export.glob("model.*")) == ["model.safetensors"]
    assert [folder.name for folder in export.parent.iterdir() if folder.name.startswith("export")] == ["export"]


def test_eval_says_that_it_cannot_measure_it(exported, lbllm, tmp_path):
    exported("llama-tied")
    result = lbllm("eval", "--recipe", tmp_path / "recipe.yaml", "eval.checkpoints=[base, export]")
    assert result.exit_code == 2
    assert "the export is a gguf file, which llama.cpp measures; measure the stage itself" in result.stderr
