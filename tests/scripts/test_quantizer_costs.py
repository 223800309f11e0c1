"""scripts/quantizer_costs.py on a toy."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from packed_models import load
from transformers import AutoModelForCausalLM, AutoTokenizer

import lbllm_cli.hf
from lbllm_cli.data.sources import STYLES, builtin_records

LENGTH = 48


@torch.no_grad()
def by_hand(export, quantized: bool) -> list[float]:
    """KL of each style, a position at a time."""
    model, source = load(export, "off"), AutoModelForCausalLM.from_pretrained(export.parents[1] / "model").eval()
    lbllm_cli.hf.quantize_activations(model, quantized)
    found = []
    for style in STYLES:
        text = next(iter(builtin_records("evaluation", style)))["text"]
        rows = AutoTokenizer.from_pretrained(export)(text, add_special_tokens=False, return_tensors="pt")["input_ids"][:, :LENGTH]
        pairs = zip(source(rows).logits[0].double(), model(rows, use_cache=False).logits[0].double(), strict=True)
        found.append(sum(float((t.softmax(0) * (t.log_softmax(0) - s.log_softmax(0))).sum()) for t, s in pairs) / LENGTH)
    return found


@pytest.mark.slow
def test_kinds_of_quantizers_cost_something_each(export_of):
    export = export_of("llama-tied")
    command = [
        sys.executable,
        ROOT / "scripts" / "quantizer_costs.py",
        "--export",
        export,
        "--model",
        export.parents[1] / "model",
    ]
    environment = {**os.environ, "LBLLM_KERNELS": "auto"}
    done = subprocess.run(
        [*command, "--length", str(LENGTH), "--dtype", "float32"], capture_output=True, text=True, env=environment, check=True
    )
    rows = {line.split()[0]: [float(value) for value in line.split()[1:]] for line in done.stdout.splitlines()}
    names = list(rows)
    assert (names[0], names[-1]) == ("weights", "all")
    inputs = {f"self_attn.{name}_proj.input" for name in "qo"} | {f"mlp.{name}_proj.input" for name in ("gate", "down")}
    assert rows.keys() == inputs | {"self_attn.key_cache", "self_attn.value_cache", "weights", "all"}
    assert rows["weights"] == pytest.approx(by_hand(export, False), abs=1e-4)
    assert rows["all"] == pytest.approx(by_hand(export, True), abs=1e-4)
    assert len({tuple(values) for values in rows.values()}) == len(rows)
