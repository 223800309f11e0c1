"""Text that a model writes: streamed, or kept as calibration text."""

from functools import wraps

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM


def test_generate_stops_when_its_reader_does(ok, recipe, tmp_path, monkeypatch):
    from lbllm_cli.models.streaming import Request, stream_text

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
    from lbllm_cli.models.sampling import cached_sample
    from lbllm_cli.pipeline.plan import prepare
    from lbllm_cli.recipe.base import Source
    from lbllm_cli.recipe.load import load_recipe

    command = ("ptq", "--recipe", recipe, "data.calibration.source=generate:")
    plan = prepare(load_recipe(recipe))
    cached_sample(plan.model, plan.tokenizer, tmp_path / "run", Source(source="generate:"), (6, 32), 0)
    (cache,) = (tmp_path / "run" / "generated").iterdir()
    save_file(content, cache) if isinstance(content, dict) else cache.write_bytes(content)
    result = lbllm(*command)
    assert result.exit_code == 2
    assert f"{cache} is damaged" in result.stderr
    assert "delete it" in result.stderr
