"""The table of several ranks: arithmetic that adds up, and causes that are named."""

import importlib.util
import sys

import pytest
from conftest import ROOT

FOLDER = ROOT / "scripts" / "bench"


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("scaling", FOLDER / "scaling.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "scaling", module)  # for its dataclasses
    spec.loader.exec_module(module)
    return module


def test_what_is_lost_is_what_ranks_do_not_divide(scaling):
    alone = scaling.Estimate({"fits": 8.0, "training steps": 80.0}, {}, {})
    limits = {"fits": "matrix products", "training steps": "launches"}
    found = scaling.Estimate({"fits": 3.0, "training steps": 12.0}, {scaling.OWNERS: 5.0}, limits)
    assert found.seconds == 20
    lost = scaling.losses(alone, found, 8, spread=True)
    assert lost == {scaling.WAITS[scaling.OWNERS]: 5.0, scaling.UNDIVIDED["fits"]: 2.0, "launches, in training steps": 2.0}
    assert found.seconds == alone.seconds / 8 + sum(lost.values())


def test_a_table_of_one_model(scaling, monkeypatch, capsys):
    line = ["scaling.py", "distill.end_to_end.train=[weights,levels]", "--models", "llama2-7b", "--ranks", "1", "64",
            "--step", "act-calib=0.5"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", line)
    scaling.main()
    said = capsys.readouterr().out
    assert said.startswith("Arithmetic, not a measurement")
    header, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if line.startswith("|"))
    assert [row[1] for row in rows] == ["ptq", "distill", "distill-e2e", "act-calib"]
    assert all(len(row) == len(header) for row in rows)
    # 32 blocks of 120 steps and half a second each, 0.53 h, and the passes beside them.
    minutes = float(rows[3][2].split()[0])
    assert 32 < minutes < 60
    assert "gradients between machines" in rows[1][-1]
    assert "gradients between machines" in rows[2][-1]


def test_ranks_beyond_a_step_are_refused(scaling, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--ranks", "128"])
    with pytest.raises(SystemExit):
        scaling.main()
    assert "1 to 64" in capsys.readouterr().err
