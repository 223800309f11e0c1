"""A soft cap of attention's logits counts, whichever attention transformers takes by itself."""

from pathlib import Path

import pytest
import torch
from conftest import save_toy
from packed_models import exported
from stages import logits_of
from transformers import AutoConfig, AutoModelForCausalLM

import lbllm_cli.hf  # noqa: F401 - registers the packed format
from lbllm_cli.evaluation.tasks import open_lm
from lbllm_cli.models.model import open_model
from lbllm_cli.models.whole_folder import check_folder, load_folder
from lbllm_cli.recipe.schema import Model
from lbllm_cli.runtime.softcap import keep_soft_cap

CPU = torch.device("cpu")


@pytest.fixture
def capped(tmp_path) -> Path:
    """A Gemma 2 whose cap is small enough to be felt."""
    return save_toy(tmp_path / "model", "gemma2", attn_logit_softcapping=0.5)


def eager(folder: Path, **changes) -> torch.Tensor:
    """Logits by transformers' own loop, which knows the cap."""
    config = AutoConfig.from_pretrained(folder)
    for key, value in changes.items():
        setattr(config, key, value)
    return logits_of(AutoModelForCausalLM.from_pretrained(folder, config=config, attn_implementation="eager").eval())


def test_a_folder_that_is_loaded_whole_has_the_cap(capped):
    wanted = eager(capped)
    assert (wanted - eager(capped, attn_logit_softcapping=None)).abs().max() > 1  # measured 4.9
    assert torch.equal(logits_of(load_folder(capped, check_folder(capped, False), False)), wanted)
    assert torch.equal(logits_of(open_lm(capped, torch.float32, CPU, 1, False).model.eval()), wanted)


@torch.no_grad()
def test_blocks_that_stages_fit_have_the_cap(capped):
    model = AutoModelForCausalLM.from_pretrained(capped, attn_implementation="eager").eval()
    hidden = torch.randn(2, 20, 80, generator=torch.Generator().manual_seed(1))
    wanted = model.model.layers[1](hidden, **arguments(model, hidden))
    assert torch.allclose(open_model(Model(path=str(capped)), CPU).block(1)(hidden), wanted, atol=1e-6)


def arguments(model, hidden: torch.Tensor) -> dict[str, object]:
    """What the model gives its full layers."""
    places = torch.arange(hidden.shape[1]).unsqueeze(0)
    later = torch.full((hidden.shape[1],) * 2, -torch.inf).triu(1)
    return {"position_embeddings": model.model.rotary_emb(hidden, places), "attention_mask": later[None, None]}


@pytest.mark.heavy
def test_a_packed_export_has_the_cap(capped, tmp_path):
    folder = exported(tmp_path, capped, ptq={"rounds": 0})
    wanted = eager(folder)
    assert (wanted - eager(folder, attn_logit_softcapping=None)).abs().max() > 1  # measured 4.9
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(folder).eval()), wanted)


def test_attention_that_knows_the_cap_is_left(capped):
    config = AutoConfig.from_pretrained(capped, attn_implementation="flex_attention")
    keep_soft_cap(config)
    assert config._attn_implementation == "flex_attention"
