"""Exports in the library alone against the same exports in transformers; what it leaves to transformers."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import save_toy
from packed_models import ROUNDING, TIPPED, exported, ids, kernels, load
from safetensors.torch import load_file, save_file

import lbllm_cli.hf  # noqa: F401 - registers the packed format
from lbllm_cli.core.errors import UsageError
from lbllm_cli.engine import model as engine
from lbllm_cli.engine.config import Unfit
from lbllm_cli.engine.location import library_path
from lbllm_cli.engine.model import Model, Session

if library_path() is None:
    pytest.skip("this installation has no compiled kernels", allow_module_level=True)

FAMILIES = ("llama-tied", "llama-untied", "qwen2-biases", "qwen3", "seed-oss")


def off(found, wanted) -> float:
    return float(np.abs(found - wanted).mean() / np.abs(wanted).mean())


def edit(folder, **changes) -> None:
    """Replaces tensors of a folder's one file; None takes one out."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, change in changes.items():
        if change is None:
            del tensors[name]
        else:
            tensors[name] = change(tensors.get(name))
    save_file(tensors, file, metadata={"format": "pt"})


def rewrite(file, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture
def copy_of(export_of, tmp_path):
    """An export that a test may change."""
    import shutil

    return lambda family: shutil.copytree(export_of(family), tmp_path / family)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_token_by_token_it_is_the_decode_step_of_transformers(family, export_of):
    reference, session = load(export_of(family), dtype=torch.float32), Session(Model(export_of(family), 1), room=3)
    cache, worst = None, 0.0
    for token in ids(1, 40)[0].tolist():
        output = reference(torch.tensor([[token]]), past_key_values=cache)
        cache, worst = output.past_key_values, max(worst, off(session.run([token]), output.logits[0, -1].numpy()))
    # The first token's keys and values come from torch there: a code may go over its edge.
    assert worst < TIPPED
    assert session.tokens == ids(1, 40)[0].tolist()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_prompt_at_once_is_that_prompt_in_transformers(family, export_of):
    reference, model = load(export_of(family), dtype=torch.float32), Model(export_of(family), 2)
    differences = []
    for seed in range(4):
        tokens = ids(1, 90, seed)
        wanted = reference(tokens).logits[0, -1].numpy()
        differences.append(off(Session(model).run(tokens[0].tolist()), wanted))
    assert sorted(differences)[1] < ROUNDING
    assert max(differences) < TIPPED


def test_pieces_of_a_prompt_and_growing_memory_change_nothing(export_of, monkeypatch):
    model, tokens = Model(export_of("llama-tied"), 1), ids(1, 60)[0].tolist()
    whole = Session(model, room=100).run(tokens).copy()
    monkeypatch.setattr(engine, "CHUNK", 7)
    pieces = Session(model, room=1)
    pieces.run(tokens[:20])
    assert off(pieces.run(tokens[20:]), whole) < TIPPED
    pieces.keep(20)
    assert pieces.tokens == tokens[:20]
    assert off(pieces.run(tokens[20:]), whole) < TIPPED


def test_threads_change_nothing(export_of):
    tokens = ids(1, 70)[0].tolist()
    one, three = (Session(Model(export_of("qwen3"), threads)).run(tokens) for threads in (1, 3))
    assert np.array_equal(one, three)


def test_an_interrupted_run_leaves_a_session_that_goes_on(export_of, monkeypatch):
    model, tokens = Model(export_of("llama-tied"), 1), ids(1, 30)[0].tolist()
    wanted, session = Session(model).run(tokens).copy(), Session(model)
    monkeypatch.setattr(engine, "CHUNK", 10)
    calls = []

    class Library:
        def __getattr__(self, name):
            return getattr(type(self).real, name)

        real = model.lib

        def lbllm_run(self, *arguments):
            calls.append(arguments)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return self.real.lbllm_run(*arguments)

    monkeypatch.setattr(model, "lib", Library())
    with pytest.raises(KeyboardInterrupt):
        session.run(tokens)
    assert session.tokens == tokens[:10]
    assert off(session.run(tokens[10:]), wanted) < TIPPED


def test_tokens_that_the_model_does_not_have(export_of):
    session = Session(Model(export_of("llama-tied"), 1))
    for tokens in ([], [-1], [10**6]):
        with pytest.raises(ValueError, match=r"expected tokens|a token"):
            session.run(tokens)
    assert session.tokens == []


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("mistral-sliding", {}, "attention has a window"),
        ("llama-tied", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama-tied", {"model_type": "granite"}, "model_type"),
        ("llama-tied", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type: expected default"),
        ("llama-tied", {"rope_scaling": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type: expected default"),
        ("llama-tied", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "rope_parameters: 'factor'"),
        ("llama-tied", {"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "not finite"),
        ("llama-tied", {"intermediate_size": 96}, "expected U8"),
        ("llama-tied", {"head_dim": 7}, "head_dim"),
        ("llama-tied", {"tie_word_embeddings": False}, "lm_head.weight: there is none"),
        ("qwen2-biases", {"use_sliding_window": True, "sliding_window": 4}, "attention has a window"),
        ("llama-tied", {"quantization_config": None}, "quantization_config"),
    ],
)
def test_configurations_that_are_left_to_transformers(copy_of, family, changes, message):
    folder = copy_of(family)
    rewrite(folder / "config.json", **changes)
    with pytest.raises(Unfit, match=message):
        Model(folder, 1)


BLOCK = "model.layers.1."


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.norm.weight", lambda t: t * float("nan"), "holds NaN"),
        ("model.norm.weight", None, "got nothing"),
        ("model.embed_tokens.weight", lambda t: t.bfloat16() / 0, "holds NaN or infinity"),
        (f"{BLOCK}self_attn.o_proj.scale", lambda t: t * float("inf"), "no scale"),
        (f"{BLOCK}self_attn.o_proj.scale", lambda t: -t, "no scale"),
        (f"{BLOCK}self_attn.key_cache.act_levels", lambda t: t.flip(1), "without meaning"),
        (f"{BLOCK}mlp.down_proj.input.act_zero", lambda t: t * 0 + 255, "without meaning"),
        (f"{BLOCK}mlp.down_proj.input.act_clip", lambda t: t * 0 + 1, "without meaning"),
        (f"{BLOCK}self_attn.key_cache.act_centre", None, "got nothing"),
        (f"{BLOCK}self_attn.odd", lambda _: torch.ones(3), "none of the tensors that the library reads"),
    ],
)
def test_tensors_that_are_left_to_transformers(copy_of, name, change, message):
    folder = copy_of("llama-tied")
    edit(folder, **{name: change})
    with pytest.raises(Unfit, match=message):
        Model(folder, 1)


@pytest.mark.parametrize(("family", "missing"), [("qwen2-biases", "q"), ("seed-oss", "k")])
def test_biases_of_the_family_must_be_there(copy_of, family, missing):
    folder = copy_of(family)
    edit(folder, **{f"{BLOCK}self_attn.{missing}_proj.bias": None})
    with pytest.raises(Unfit, match=f"{missing}_proj.bias"):
        Model(folder, 1)


def test_biases_that_the_configuration_does_not_have_are_none_that_are_read(copy_of):
    folder = copy_of("llama-tied")
    edit(folder, **{f"{BLOCK}self_attn.q_proj.bias": lambda _: torch.ones(80)})
    with pytest.raises(Unfit, match="none of the tensors that the library reads"):
        Model(folder, 1)


@torch.no_grad()
def test_mistral_without_a_window(tmp_path):
    folder = exported(tmp_path, save_toy(tmp_path / "model", "mistral-sliding", sliding_window=None), ptq={"rounds": 0})
    reference, session, cache = load(folder, dtype=torch.float32), Session(Model(folder, 1)), None
    for token in ids(1, 12)[0].tolist():
        output = reference(torch.tensor([[token]]), past_key_values=cache)
        cache, found = output.past_key_values, session.run([token])
        assert off(found, output.logits[0, -1].numpy()) < TIPPED


def test_damaged_files_are_refused(copy_of):
    folder = copy_of("llama-tied")
    (folder / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(UsageError, match=r"model\.safetensors"):
        Model(folder, 1)


def test_without_kernels_there_is_none(export_of):
    with kernels("off"), pytest.raises(Unfit, match="LBLLM_KERNELS"):
        Model(export_of("llama-tied"), 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_embeddings_of_sixteen_bits(copy_of, dtype):
    tokens = ids(1, 20)[0].tolist()
    folder = copy_of("llama-untied")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        edit(folder, **{name: lambda t: t.to(dtype).float()})
    wanted = Session(Model(folder, 1)).run(tokens).copy()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        edit(folder, **{name: lambda t: t.to(dtype)})
    assert off(Session(Model(folder, 1)).run(tokens), wanted) < ROUNDING


@pytest.mark.parametrize(
    ("form", "granularity", "bits"),
    [("uniform", "group", 4), ("knee", "token", 4), ("knee", "group", 2), ("uniform", "token", 2)],
)
@torch.no_grad()
def test_other_quantizers_and_levels_of_fewer_bits(tmp_path, form, granularity, bits):
    toy = save_toy(tmp_path / "model", "llama-tied")
    folder = exported(
        tmp_path, toy, ptq={"rounds": 0, "level_bits": bits}, act={"form": form, "kv_form": form, "granularity": granularity}
    )
    reference, session, cache = load(folder, dtype=torch.float32), Session(Model(folder, 1)), None
    for token in ids(1, 12)[0].tolist():
        output = reference(torch.tensor([[token]]), past_key_values=cache)
        cache, found = output.past_key_values, session.run([token])
        assert off(found, output.logits[0, -1].numpy()) < TIPPED


def test_torch_is_not_needed(export_of):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from lbllm_cli.cli.app import app\n"
        f"app(['generate', '--model', {str(export_of('llama-tied'))!r}, '--prompt', 'the sea', '--max-new-tokens', '5'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "native engine" in done.stderr
