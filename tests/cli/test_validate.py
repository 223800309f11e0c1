"""`lbllm validate` for several ranks: what each needs, what they hand over, and what is refused."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import save_toy, write_recipe
from rich.console import Console
from rich.table import Table

from lbllm_cli.cli.forecasts import print_table
from lbllm_cli.pipeline.forecast import Need, memory_warnings
from lbllm_cli.pipeline.world import World
from lbllm_cli.runtime.cards import CARDS

GIB = 2**30


@pytest.fixture
def big(tmp_path, monkeypatch):
    """A recipe for the shape of LLaMA-2-7B, without weights, on a machine with a large disk."""
    from transformers import LlamaConfig

    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**15))
    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    LlamaConfig(**shape, max_position_embeddings=4096).save_pretrained(tmp_path / "7b")
    return write_recipe(
        tmp_path / "r.yaml", tmp_path / "7b", tmp_path / "run", ptq={"group_size": 128}, runtime={"streams": "disk"},
        distill={"batch_size": 64}, act_calib={"batch_size": 64},
        data={
            "calibration": {"source": "builtin:calibration", "sequences": 128, "length": 2048},
            "training": {"source": "builtin:calibration", "sequences": 1024, "length": 2048},
        },
    )  # fmt: skip


def facts_of(ok, recipe, *options):
    return json.loads(ok("validate", "--recipe", recipe, "--json", *options).stdout)


def test_one_rank_is_what_it_was(ok, recipe):
    alone, one = (facts_of(ok, recipe, *options) for options in ((), ("--world-size", "1", "--per-node", "1")))
    assert "ranks" not in alone
    # A device without a maker's figures is measured each time.
    alone.pop("forecast_seconds")
    one.pop("forecast_seconds")
    assert alone == one
    assert "rank" not in ok("validate", "--recipe", recipe).stdout


def test_json_has_what_each_rank_needs_and_hands_over(ok, big):
    alone, found = facts_of(ok, big), facts_of(ok, big, "--world-size", "64")
    ranks = found["ranks"]
    assert (ranks["world_size"], ranks["per_node"], ranks["machines"]) == (64, 8, 8)
    distill = ranks["stages"]["distill"]
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008) // 32
    # float32 here, as the folder says nothing; gradients go to one owner of eight, of the largest linears 45 million weights.
    size = distill["bytes_per_step"]["reduce"] // weights
    assert distill["bytes_per_step"] == {
        "reduce": size * weights, "broadcast": size * weights, "all-reduce": 8,
        "all-reduce between nodes": size * 4096 * 11008,
    }  # fmt: skip
    assert distill["steps_per_block"] == 30
    assert set(distill["busy_seconds"]) == {"computing", "NVLink", "PCIe 5 x16", "400 Gb/s", "100 Gb/s"}
    assert distill["busy_seconds"]["100 Gb/s"] > 3 * distill["busy_seconds"]["400 Gb/s"]
    assert distill["bottleneck"]["H100, NVLink, 100 Gb/s"] == "100 Gb/s"
    assert set(ranks["stages"]["ptq"]["bytes_per_block"]) == {"all-reduce", "gather"}
    assert set(found["forecast_seconds"]["distill"]) == set(distill["bottleneck"])
    before, after = alone["forecast_bytes"], found["forecast_bytes"]
    for stage in ("ptq", "distill", "act-calib"):
        assert after[stage]["streams"] * 64 == before[stage]["streams"]
    # Masters of the largest linear instead of all; the disk is that of all ranks.
    assert after["distill"]["device"] < before["distill"]["device"]
    assert after["act-calib"]["device"] == before["act-calib"]["device"]
    assert after["distill"]["disk"] >= before["distill"]["disk"]
    assert after["distill"]["ram"] < before["distill"]["ram"]


def test_tables_say_which_link_holds_a_stage_up(ok, big):
    one, two = (ok("validate", "--recipe", big, "--world-size", "16", "--per-node", node).stdout for node in ("16", "8"))
    assert "16 ranks on one machine" in " ".join(one.split())
    assert "Gb/s" not in one
    assert "distill: held up by" in two
    assert "100 Gb/s" in two


@pytest.mark.parametrize("options", [(), ("--world-size", "16", "--per-node", "8")])
def test_tables_are_whole_in_a_narrow_terminal(ok, big, monkeypatch, options):
    # Of the time that a processor takes, which is measured each time, "this machine" is the only column.
    monkeypatch.setattr("lbllm_cli.cli.durations.probed", lambda device: CARDS["l4"])
    tables = []
    for columns in ("40", "400"):
        monkeypatch.setenv("COLUMNS", columns)
        tables.append(ok("validate", "--recipe", big, *options).stdout)
    assert tables[0] == tables[1]
    assert "\u2026" not in tables[0]
    assert ("RTX 3090" if not options else "H100, PCIe 5 x16, 100 Gb/s") in tables[0]


def test_a_table_is_printed_whole(capsys):
    table = Table(title="a title")
    for column in range(30):
        table.add_column(f"column {column}")
    table.add_row(*(f"value {row}" for row in range(30)))
    print_table(Console(width=20), table)
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "value" in line]
    assert [cell.strip() for cell in row.strip("\u2502").split("\u2502")] == [f"value {row}" for row in range(30)]


def test_stages_with_a_phase_are_all_there(ok, big):
    changes = ("distill.end_to_end.sequences=64", "distill.end_to_end.batch_size=8", "act_calib.end_to_end.sequences=64",
               "act_calib.end_to_end.batch_size=8")  # fmt: skip
    alone, found = facts_of(ok, big, *changes), facts_of(ok, big, *changes, "--world-size", "8")
    assert list(found["ranks"]["stages"]) == ["ptq", "distill", "act-calib", "distill-e2e", "act-calib-e2e"]
    assert found["ranks"]["stages"]["distill-e2e"]["steps"] == 8
    assert found["forecast_bytes"]["distill-e2e"]["streams"] * 8 == alone["forecast_bytes"]["distill-e2e"]["streams"]
    # Levels are copies: each rank keeps what it has.
    assert found["forecast_bytes"]["distill-e2e"]["device"] == alone["forecast_bytes"]["distill-e2e"]["device"]
    weights = (*changes, "distill.end_to_end.train=[weights,levels]")
    alone, found = facts_of(ok, big, *weights), facts_of(ok, big, *weights, "--world-size", "8")
    step = found["ranks"]["stages"]["distill-e2e"]["bytes_per_step"]
    assert step["reduce"] == step["broadcast"]
    assert found["forecast_bytes"]["distill-e2e"]["device"] < alone["forecast_bytes"]["distill-e2e"]["device"] / 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--world-size", "12"), "--world-size 12 is no multiple of --per-node 8"),
        (("--world-size", "6", "--per-node", "4"), "give --per-node a divisor of 6"),
        (("--world-size", "2", "--per-node", "3"), "--world-size 2 is no multiple of --per-node 3"),
        (("--world-size", "8"), "ptq: 6 sequences for 8 ranks; raise data.calibration.sequences, or start at most 6"),
        (("--world-size", "4"), "distill.batch_size is 2, and 4 ranks take part in every step; raise it to 4, or start at"),
        (("--world-size", "8"), "act-calib.batch_size"),
    ],
)  # fmt: skip
def test_ranks_that_do_not_fit_are_refused(lbllm, tmp_path, options, message):
    recipe = write_recipe(tmp_path / "r.yaml", save_toy(tmp_path / "model"), tmp_path / "run")
    result = lbllm("validate", "--recipe", recipe, *options)
    assert result.exit_code == 2
    assert message.replace("act-calib", "act_calib") in result.stderr
    assert result.stdout == ""


def test_sequences_of_ranks_are_those_that_the_stage_reads(lbllm, tmp_path):
    keys = {"act_calib": {"sequences": 3, "batch_size": 2}, "distill": {"batch_size": 8}}
    recipe = write_recipe(tmp_path / "r.yaml", save_toy(tmp_path / "model"), tmp_path / "run", **keys)
    text = [f"data.{name}.{key}" for name in ("calibration", "training") for key in ("sequences=16", "length=64")]
    result = lbllm("validate", "--recipe", recipe, *text, "--world-size", "8")
    assert "act-calib: 3 sequences for 8 ranks; raise act_calib.sequences, or start at most 3" in result.stderr


def test_products_have_all_bits_of_float32(ok, recipe):
    """In NVIDIA's containers they begin with ten of mantissa."""
    torch.set_float32_matmul_precision("high")
    ok("validate", "--recipe", recipe)
    assert torch.get_float32_matmul_precision() == "highest"


def test_groups_that_no_row_fills_are_named(ok, recipe):
    """A group a row, people mean; a row of 80 then takes 4,096 codes."""
    command = ("validate", "--recipe", recipe, "ptq.level_bits=2")
    assert "fewer inputs than a group" not in ok(*command, "ptq.group_size=16").stderr
    found = ok(*command, "ptq.group_size=4096").stderr
    assert "its 80 are filled up to 4096 and take 102.70 bits a weight; lower ptq.group_size" in found


@pytest.mark.parametrize("size", ["0", "-1", "many"])
def test_a_world_that_is_no_number_of_ranks(lbllm, recipe, size):
    result = lbllm("validate", "--recipe", recipe, "--world-size", size)
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr


def test_all_ranks_of_a_machine_need_its_memory(monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=3 * GIB))
    model = SimpleNamespace(backend=SimpleNamespace(shares_ram=True))
    need = {"stage": "ptq", "device": 0.0, "ram": 1.0 * GIB, "disk": 0.0, "streams": 0.0, "place": "disk"}
    assert memory_warnings(Need(**need), model) == []
    assert memory_warnings(Need(**need, world=World(4, 2)), model) == []
    (warning,) = memory_warnings(Need(**need, world=World(8, 4)), model)
    assert "needs about 4.0 GiB of RAM for 4 ranks of a machine, 3.0 GiB are available" in warning


@pytest.fixture
def wrong(lbllm, tmp_path, monkeypatch):
    """wrong(*overrides): lines of the refusal of a recipe of all stages, whose texts lie in the current folder."""
    monkeypatch.chdir(tmp_path)
    phases = {section: {"end_to_end": {"sequences": 6}} for section in ("distill", "act_calib")}
    recipe = write_recipe(tmp_path / "r.yaml", save_toy(tmp_path / "model"), tmp_path / "run", **phases)

    def lines(*overrides: str) -> list[str]:
        result = lbllm("validate", "--recipe", recipe, *overrides)
        assert result.exit_code == 2
        return result.stderr.removeprefix("lbllm: ").splitlines()

    return lines


def test_a_text_is_wrong_once_and_behind_its_key(wrong, tmp_path):
    (tmp_path / "short.txt").write_text("A short text. ")
    (line,) = wrong("data.training.source=short.txt")
    assert line.startswith("data.training: short.txt holds ")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"title": "b"}\n')
    missing = "a.jsonl: record 2 has no field `text`, it has: title; set text_key or messages_key"
    assert wrong("data.training.source=a.jsonl") == [f"data.training: {missing}"]
    assert wrong("act_calib.end_to_end.source=a.jsonl") == [f"act_calib.end_to_end: {missing}"]
    every = ("data.calibration.source=a.jsonl", "data.training.source=a.jsonl")
    assert wrong(*every) == [f"data.calibration, data.training: {missing}"]
    sets = "data.evaluation=[{name: a, source: a.jsonl, length: 32}, {name: b, source: short.txt, length: 32, segments: 9}]"
    first, second = wrong(sets)
    assert first == f"data.evaluation a: {missing}"
    assert second.startswith("data.evaluation b: short.txt holds ")


def test_a_source_that_is_not_there_is_named_once_with_all_its_keys(wrong):
    (line,) = wrong("data.calibration.source=no.txt", "distill.end_to_end.source=[no.txt]")
    assert line.startswith("data.calibration, distill.end_to_end: source no.txt: no such file; presets: ")
    (line,) = wrong("data.training.source=~nosuchuser/a.txt")
    assert line == "data.training: source ~nosuchuser/a.txt: there is no such user; write the path out"
    assert wrong("data.training.source={source: 'builtin:training', split: test}") == [
        "data.training: source builtin:training does not read split"
    ]
