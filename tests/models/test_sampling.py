"""Text that a model writes: streamed, or kept as calibration text."""

from functools import wraps
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM


def test_generate_stops_when_its_reader_does(ok, recipe, tmp_path, monkeypatch):
    from lbllm_cli.models.prompts import Request
    from lbllm_cli.models.streaming import stream_text

    passes, forward = [], LlamaForCausalLM.forward

    @wraps(forward)
    def counted(*arguments, **options):
        passes.append(1)
        return forward(*arguments, **options)

    monkeypatch.setattr(LlamaForCausalLM, "forward", counted)
    ok("ptq", "--recipe", recipe)
    ok("export", "--recipe", recipe)
    config = tmp_path / "run" / "export" / "config.json"
    config.write_text(config.read_text().replace('"max_position_embeddings": 128', '"max_position_embeddings": 200000'))
    pieces = stream_text(tmp_path / "run" / "export", Request("the", True, 100_000), torch.device("cpu"), print)
    next(pieces)
    pieces.close()
    assert 0 < len(passes) < 50_000  # measured 3; the last token would be the 100,000th


def test_generated_calibration_text_is_cached_and_reproducible(ok, tmp_path, recipe):
    command = ("ptq", "--recipe", recipe, "data.calibration.source=generate:")
    assert "sampled from the model" in ok(*command).stderr
    (cache,) = (tmp_path / "run" / "generated").iterdir()
    first = cache.read_bytes()
    assert "up to date" in ok(*command).stderr
    cache.unlink()
    assert "up to date" in ok(*command).stderr
    assert cache.read_bytes() == first


@pytest.mark.parametrize(
    "content",
    [b"", b"x" * 50, {"other": torch.zeros(6, 32, dtype=torch.int64)}, {"input_ids": torch.zeros(6, 31, dtype=torch.int64)},
     {"input_ids": torch.zeros(6, 32)}, {"input_ids": torch.full((6, 32), 1024)}, {"input_ids": torch.full((6, 32), -1)}],
    ids=range(7),
)  # fmt: skip
def test_sampled_text_that_is_damaged_is_refused(lbllm, ok, tmp_path, recipe, content):
    from lbllm_cli.models.sampling import Sampling, Silent, cached_sample
    from lbllm_cli.pipeline.plan import prepare
    from lbllm_cli.recipe.load import load_recipe

    command = ("ptq", "--recipe", recipe, "data.calibration.source=generate:")
    plan = prepare(load_recipe(recipe))
    cached_sample(plan.model, plan.tokenizer, tmp_path / "run", Sampling(6, 32, 0, 1.0), Silent())
    (cache,) = (tmp_path / "run" / "generated").iterdir()
    save_file(content, cache) if isinstance(content, dict) else cache.write_bytes(content)
    result = lbllm(*command)
    assert result.exit_code == 2
    assert f"{cache} is damaged" in result.stderr
    assert "delete it" in result.stderr


@pytest.fixture
def sampling(recipe, tmp_path, monkeypatch):
    """sampling(stop): 6 sequences in pieces of 2; stop: the forward pass after which a signal arrives, None for none.

    listener: who is told how far it is.
    """
    from lbllm_cli.core.errors import Interrupted
    from lbllm_cli.models import sampling
    from lbllm_cli.pipeline.plan import prepare
    from lbllm_cli.recipe.load import load_recipe

    monkeypatch.setattr(sampling, "ROWS_AT_ONCE", 2)
    plan = prepare(load_recipe(recipe))

    def run(stop=None, folder="run", listener=None):
        passes = []

        def check():
            passes.append(None)
            if len(passes) == stop:
                raise Interrupted("stopped")

        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(sampling.interrupt, "check", check)
            wanted = sampling.Sampling(6, 9, 0, 1.0)
            tokens = sampling.cached_sample(plan.model, plan.tokenizer, tmp_path / folder, wanted, listener or sampling.Silent())
        return tokens, len(passes)

    return run


@pytest.mark.parametrize("bos", [True, False])
def test_sampled_text_goes_on_where_it_was_interrupted(sampling, tmp_path, monkeypatch, bos):
    from transformers import PreTrainedTokenizerBase

    from lbllm_cli.core.errors import Interrupted

    if not bos:
        monkeypatch.setattr(PreTrainedTokenizerBase, "bos_token_id", None, raising=False)
    expected, passes = sampling(folder="whole")
    assert passes == 27
    (whole,) = (tmp_path / "whole" / "generated").iterdir()
    for stop in (9 + 4, 9 + 1):
        with pytest.raises(Interrupted):
            sampling(stop)
    (kept,) = (tmp_path / "run" / "generated").iterdir()
    assert kept.name == f"{whole.stem}.partial"
    found, passes = sampling()
    assert passes == 9, "two pieces of three were there"
    assert torch.equal(found, expected)
    (resumed,) = (tmp_path / "run" / "generated").iterdir()
    assert (resumed.name, resumed.read_bytes()) == (whole.name, whole.read_bytes())
    assert sampling()[1] == 0
    kept.mkdir()  # as after a kill between the last two steps
    assert torch.equal(sampling()[0], expected)
    assert not kept.exists()


def test_sampling_says_how_far_it_is(sampling):
    from lbllm_cli.core.errors import Interrupted

    ticks, notes = [], []
    listener = SimpleNamespace(tick=ticks.append, note=notes.append)
    with pytest.raises(Interrupted):
        sampling(9 + 4, listener=listener)
    assert (ticks[0], ticks[8]) == tuple(f"sampling sequences 1 to 2 of 6, token {token}/9" for token in (1, 9))
    assert ticks[9] == "sampling sequences 3 to 4 of 6, token 1/9"
    assert len(ticks) == 9 + 3
    sampling(listener=listener)
    # What was there is not told again.
    assert [note.split("  eta ")[0] for note in notes] == [f"{done} of 6 sequences are sampled" for done in (2, 4, 6)]
    assert ["eta" in note for note in notes] == [True, True, False]


def test_the_log_of_a_stage_says_how_far_sampling_is(ok, recipe):
    assert "ptq: 6 of 6 sequences are sampled" in ok("ptq", "--recipe", recipe, "data.calibration.source=generate:").stderr


@pytest.mark.parametrize(
    "content",
    [b"x" * 50, {"input_ids": torch.zeros(2, 9, dtype=torch.int64)}, {"input_ids": torch.zeros(1, 9, dtype=torch.int64)},
     {"input_ids": torch.zeros(2, 9, dtype=torch.int64), "generator": torch.zeros(5, dtype=torch.uint8)},
     {"input_ids": torch.zeros(2, 9, dtype=torch.int64), "generator": torch.zeros(5056)}],
    ids=range(5),
)  # fmt: skip
def test_a_piece_that_is_damaged_is_refused(sampling, tmp_path, content):
    from lbllm_cli.core.errors import Interrupted, UsageError

    with pytest.raises(Interrupted):
        sampling(13)
    (piece,) = (tmp_path / "run" / "generated").glob("*.partial/*")
    save_file(content, piece) if isinstance(content, dict) else piece.write_bytes(content)
    with pytest.raises(UsageError, match=f"{piece} is damaged .*; delete it: it is sampled again"):
        sampling()
