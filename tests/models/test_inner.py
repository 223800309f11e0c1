"""A folder of a model that sees pictures as well: its text model is binarized, exported and loaded as one of its own."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, SMALL, TOKENIZER_FILES, TOY, write_recipe
from safetensors.torch import load_file, save_file
from stages import logits_of
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

import lbllm_cli.hf  # noqa: F401 - registers the packed format
from lbllm_cli.models.model import open_model
from lbllm_cli.models.whole_folder import load_folder
from lbllm_cli.recipe.schema import Model

CPU = torch.device("cpu")
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A Gemma 3 with a tower for pictures, as its hub folders are laid out."""
    text = {key: value for key, value in {**SMALL, **FAMILIES["gemma3"]}.items() if key != "model_type"}
    config = Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4, image_token_index=1000)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = Gemma3ForConditionalGeneration(config)
        for tensor in model.parameters():
            tensor.data.mul_(4) if tensor.dim() > 1 else tensor.data.uniform_(-0.3, 0.3)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    for file in TOKENIZER_FILES:
        shutil.copyfile(TOY / file, folder / file)
    return folder


def newer_names(folder: Path) -> None:
    """The same folder as transformers 5 names tensors inside a model."""
    tensors = load_file(folder / "model.safetensors")
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in (("language_model.model.", "model.language_model."), ("language_model.lm_head", "lm_head")):
            name = name.replace(old, new) if name.startswith(old) else name
        renamed[f"model.{name}" if name.startswith(("vision_tower", "multi_modal")) else name] = tensor
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("names", ["older", "newer"])
@torch.no_grad()
def test_the_text_model_computes_what_the_whole_does(pictures, names):
    tokens = torch.randint(900, (2, 40), generator=torch.Generator().manual_seed(1))
    expected = Gemma3ForConditionalGeneration.from_pretrained(pictures).eval()(tokens).logits
    if names == "newer":
        newer_names(pictures)
    model = open_model(Model(path=str(pictures)), CPU)
    hidden = model.embed()(tokens)
    for index in range(model.blocks):
        hidden = model.block(index)(hidden)
    torch.testing.assert_close(model.head()(hidden), expected, rtol=0, atol=0)
    loaded = load_folder(pictures, model.config, False, dtype=torch.float32)
    torch.testing.assert_close(loaded(tokens).logits, expected, rtol=0, atol=0)


@pytest.mark.usefixtures("in_torch")
def test_its_exports_are_text_models(ok, pictures, tmp_path):
    recipe = write_recipe(tmp_path / "r.json", pictures, tmp_path / "run", ptq={"rounds": 0})
    ok("ptq", "--recipe", recipe)
    logits = {}
    for form in ("packed", "dense"):
        ok("export", "--recipe", recipe, f"export.format={form}")
        export = tmp_path / "run" / "export"
        config = json.loads((export / "config.json").read_text())
        assert (config["model_type"], config["architectures"]) == ("gemma3_text", ["Gemma3ForCausalLM"])
        assert not {"text_config", "vision_config"} & set(config)
        logits[form] = logits_of(AutoModelForCausalLM.from_pretrained(export).eval())
    torch.testing.assert_close(logits["packed"], logits["dense"], rtol=0, atol=0)
    assert ok("generate", "--model", tmp_path / "run" / "export", "--raw", "--prompt", "It was", "--max-new-tokens", "3").stdout


def test_another_tower_is_not_read_as_text(lbllm, pictures, tmp_path):
    config = json.loads((pictures / "config.json").read_text())
    (pictures / "config.json").write_text(json.dumps({**config, "model_type": "llava"}))
    result = lbllm("ptq", "--recipe", write_recipe(tmp_path / "r.json", pictures, tmp_path / "run"))
    assert result.exit_code == 2
    assert "model_type 'llava' is not supported" in result.stderr
