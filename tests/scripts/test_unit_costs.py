"""scripts/unit_costs.py on a toy."""

import importlib.util
import json

import pytest
import torch
from conftest import ROOT, save_toy
from transformers import AutoModelForCausalLM, AutoTokenizer

spec = importlib.util.spec_from_file_location("unit_costs", ROOT / "scripts" / "unit_costs.py")
costs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(costs)
QKV, MLP = "self_attn.q_proj, self_attn.k_proj, self_attn.v_proj", "mlp.gate_proj, mlp.up_proj"


@torch.no_grad()
def test_a_unit_alone_in_two_sizes(tmp_path, capsys):
    toy, out = save_toy(tmp_path / "model", "qwen2-biases"), tmp_path / "out" / "costs.jsonl"
    asked = ["--model", str(toy), "--out", str(out), "--sequences", "1", "--length", "24"]
    assert costs.main(asked) == 0
    printed = capsys.readouterr().out.splitlines()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    units = [QKV, "self_attn.o_proj", MLP, "mlp.down_proj"]
    assert [(row["block"], row["unit"]) for row in rows] == [(block, unit) for block in range(3) for unit in units]
    assert [(row["rows"], row["width"]) for row in rows[:4]] == [(160, 80), (80, 80), (224, 80), (80, 112)]
    assert all(0 < row["kl"]["16"] < 2 * row["kl"]["32"] for row in rows)
    for line, unit in zip(printed, units, strict=True):
        found = [row for row in rows if row["unit"] == unit]
        small, large = (sum(row["kl"][size] for row in found) for size in ("16", "32"))
        each = (large - small) / sum(row["rows"] * row["width"] for row in found) * 1e9
        assert line.startswith(unit)
        assert [float(word) for word in line.split()[-3:]] == pytest.approx([small, large, each], abs=6e-3)

    # The last line by hand, every block computed, once with the weights as they are and once with those of groups of 32.
    model = AutoModelForCausalLM.from_pretrained(toy, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(toy)
    text = costs.windows(tokenizer, 1, 1, 24)
    teacher = model(text).logits.double()
    found = costs.Costs(model, costs.windows(tokenizer, 1, 0, 512), text)
    linear, block = model.model.layers[2].mlp.down_proj, found.layers[2]
    before = linear.weight.clone()
    moments = found.moments[2, ("mlp.down_proj",)].mean_hessian()
    hessian, factor, _ = costs.inverse_factor(moments, 0.01)
    values = costs.fit_matrix(before, hessian, factor, costs.Ptq(group_size=16, level_bits=2), 32).values()
    assert block.mlp.down_proj is linear
    linear.weight.copy_(values)
    student = model(text).logits.double()
    kl = (teacher.softmax(-1) * (teacher.log_softmax(-1) - student.log_softmax(-1))).sum(-1).mean()
    assert rows[-1]["kl"]["32"] == pytest.approx(float(kl), rel=1e-4)

    # What is there is not measured again; other settings are refused.
    out.write_text("".join(f"{line}\n" for line in out.read_text().splitlines()[:-1]))
    assert costs.main(asked) == 0
    assert capsys.readouterr().out.splitlines() == printed
    with pytest.raises(SystemExit, match="other settings"):
        costs.main([*asked[:-1], "32"])


def test_a_mixture_of_experts_is_refused(tmp_path):
    toy = save_toy(tmp_path / "model", "qwen3-moe")
    with pytest.raises(SystemExit, match="is a mixture of experts"):
        costs.main(["--model", str(toy), "--out", str(tmp_path / "costs.jsonl")])


def test_larger_groups_where_they_cost_least():
    """By hand: rows of 64 inputs have 2.75 bits a weight in groups of 16, 2.5 in groups of 32."""
    rows = [
        {"block": block, "unit": unit, "rows": count, "width": 64, "kl": {"16": 0.1, "32": 0.1 + cost}}
        for block, unit, count, cost in ((0, "a, b", 10, 0.05), (0, "c", 10, 0.01), (1, "a, b", 10, 0.02), (1, "c", 30, 0.09))
    ]
    assert costs.allocated(rows, [16, 32], 2.75) == {}
    assert costs.allocated(rows, [16, 32], 2.74) == {"layers.0.c": 32}
    # No more than is needed.
    assert costs.allocated(rows, [16, 32], 2.70) == {"layers.0.c": 32, "layers.1.a": 32, "layers.1.b": 32}
    assert len(costs.allocated(rows, [16, 32], 2.5)) == 6
    with pytest.raises(SystemExit, match=r"groups of 32 everywhere are more than 2\.49 bits"):
        costs.allocated(rows, [16, 32], 2.49)
