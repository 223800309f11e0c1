"""Recipe to exported model, for every family; what is evaluated is what is stored is what is exported."""

import json

import pytest

import lbllm_cli.hf  # noqa: F401 - registers the packed format

# Kernels add in another order than torch; here logits are compared bit for bit.
pytestmark = pytest.mark.usefixtures("in_torch")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_blocks_with_streams_on_disk(dtype, tmp_path, ok, recipe):
    in_float32 = json.loads(ok("eval", "--recipe", recipe, "--json").stdout)["base"]["perplexity"]["novels"]
    options = (f"model.dtype={dtype}", "runtime.streams=disk")
    ok("ptq", "--recipe", recipe, *options)
    results = json.loads(ok("eval", "--recipe", recipe, *options, "--json").stdout)
    assert results["base"]["perplexity"]["novels"] == pytest.approx(in_float32, rel=0.002)  # measured 1.9e-4, 4.0e-5
    assert results["ptq"]["perplexity"]["novels"] > 0
