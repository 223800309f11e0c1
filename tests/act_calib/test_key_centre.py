"""Centred keys: a query's scores move by one number, so that attention is as it was, and 4 bits reach less far."""

import json

import pytest
import torch
from conftest import save_toy, write_recipe
from safetensors.torch import load_file
from stages import BLOCKS
from torch.nn.functional import softmax
from transformers import AutoModelForCausalLM

import lbllm_cli.hf  # noqa: F401 - registers the packed format
from lbllm_cli.act_calib.fit import fitted
from lbllm_cli.format.activations import ActivationFormat
from lbllm_cli.format.names import CENTRE, CLIP_UNIT, KEYS
from lbllm_cli.format.settings import check_settings
from lbllm_cli.models.block import block_prefix
from lbllm_cli.pipeline.checkpoint import Checkpoint

ROWS, HEADS, TOKENS, WIDTH = 2, 3, 96, 32
LAYOUT = ActivationFormat(4, 4, "group", "knee", "knee", 2, 32, key_centre=True)


@pytest.fixture
def keys() -> torch.Tensor:
    """Keys with two channels that are large in every token, as those of language models have: [rows, heads, tokens, width]."""
    found = torch.randn(ROWS, HEADS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    found[..., 5] += 12
    found[:, 1, :, 20] -= 30
    return found


def weights(keys: torch.Tensor) -> torch.Tensor:
    """Attention of some queries, in float64."""
    queries = torch.randn(ROWS, HEADS, 8, WIDTH, generator=torch.Generator().manual_seed(1)).double()
    return softmax(queries @ keys.double().mT / WIDTH**0.5, -1)


def test_what_is_stored_is_the_mean_of_a_head(keys):
    centre = fitted({KEYS: keys}, LAYOUT, 0, ())[KEYS].act_centre
    by_hand = [[sum(keys[:, h, :, c].flatten().tolist()) / (ROWS * TOKENS) for c in range(WIDTH)] for h in range(HEADS)]
    assert centre.dtype == torch.int32
    assert torch.allclose(centre / CLIP_UNIT, torch.tensor(by_hand), atol=1 / CLIP_UNIT)


def test_attention_does_not_see_it_but_for_fewer_errors(keys):
    plain_layout = ActivationFormat(4, 4, "group", "knee", "knee", 2, 32)
    centred, plain = (fitted({KEYS: keys}, layout, 0, ())[KEYS] for layout in (LAYOUT, plain_layout))
    wanted = weights(keys)
    assert float((weights(centred.centred(keys)) - wanted).abs().max()) < 1e-5  # measured 3e-7
    with torch.no_grad():
        errors = [float((weights(by(keys)) - wanted).abs().mean() / wanted.mean()) for by in (centred, plain)]
    assert errors[0] < 0.6 * errors[1], errors  # measured 0.52
    centred.enabled = False
    assert torch.equal(centred(keys), keys)


def test_gradients_pass(keys):
    by = fitted({KEYS: keys}, LAYOUT, 0, ("clip_factors",))[KEYS]
    x = keys.clone().requires_grad_()
    by(x).sum().backward()
    assert float((x.grad - 1).abs().mean()) < 0.1  # straight through but beyond the table


@pytest.mark.parametrize(
    ("name", "centre", "version"), [("llama-tied", "mean", 3), ("llama-tied", "none", 1), ("gemma2", "mean", 1)]
)
def test_files_say_it_where_it_is_so(tmp_path, ok, name, centre, version):
    """A family whose scores have a soft cap does without; files without it are what earlier versions wrote."""
    folder = save_toy(tmp_path / "model", name)
    settings = {"parent": "ptq", "epochs": 0, "key_centre": centre}
    recipe = write_recipe(tmp_path / "r.yaml", folder, tmp_path / "run", act_calib=settings)
    for command in ("ptq", "act-calib", "export"):
        ok(command, "--recipe", recipe)
    manifest = Checkpoint(tmp_path / "run", "act-calib").manifest
    assert manifest["format_version"] == version
    assert manifest["activations"].get("key_centre", False) == (version == 3)
    stored = load_file(tmp_path / "run" / "act-calib" / BLOCKS[1])
    assert (f"{block_prefix(1)}{KEYS}.{CENTRE}" in stored) == (version == 3)
    written = json.loads((tmp_path / "run" / "export" / "config.json").read_text())["quantization_config"]
    assert written["format_version"] == (4 if version == 3 else 2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export")
    loaded = model.get_decoder().layers[1].self_attn.key_cache.act_centre
    assert loaded is None if version == 1 else torch.equal(loaded, stored[f"{block_prefix(1)}{KEYS}.{CENTRE}"])


def test_a_reader_of_an_earlier_form_is_not_given_it():
    values = {"format_version": 3, "group_size": 32, "linears": ["a"], "level_bits": 4, "activations": LAYOUT.as_dict()}
    with pytest.raises(ValueError, match="format_version: expected 4 or more where keys are centred, got 3"):
        check_settings(values)
    check_settings(values | {"format_version": 4})
