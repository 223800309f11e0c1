"""`--dry-run` goes through the checks of the run, says what that would do, and writes nothing."""

import signal
from pathlib import Path

import pytest
from conftest import save_toy, write_recipe
from integration.refusal_cases import LAST, TOY, flip, replacing, stop
from integration.test_folders import content
from stages import refused

PTQ = {"group_size": 16, "rounds": 0, "em_iterations": 1}
DISTILL = {"epochs": 0, "held_out": 0.2, "end_to_end": LAST}


@pytest.fixture
def quick(tmp_path) -> Path:
    """A recipe that takes little time."""
    return write_recipe(tmp_path / "r.yaml", save_toy(tmp_path / "model", **TOY), tmp_path / "run", ptq=PTQ, distill=DISTILL)


@pytest.fixture
def dry(ok, quick, tmp_path):
    """dry(command, ...): its last line of log; nothing has changed."""

    def run(command: str, *options: str) -> str:
        before = content(tmp_path)
        lines = ok(command, "--recipe", quick, "--dry-run", *options).stderr.splitlines()
        assert content(tmp_path) == before
        return lines[-1].replace(str(tmp_path), "")

    return run


@pytest.fixture
def dry_refused(lbllm, quick, tmp_path):
    """The message of a dry run that is refused, the same as that of the run."""

    def run(command: str, *options: str) -> str:
        found = [refused(lbllm, tmp_path / "run", command, "--recipe", quick, *options, *dry) for dry in (["--dry-run"], [])]
        messages = [message[message.index("lbllm: ") :] for message in found]
        assert messages[0] == messages[1]
        return messages[0]

    return run


def test_a_stage_that_was_stopped(lbllm, quick, dry, dry_refused, monkeypatch):
    assert dry("ptq") == "ptq: would write /run/ptq"
    with monkeypatch.context() as patch:
        replacing("progress.json", stop(signal.SIGTERM), 2)(patch)
        assert lbllm("ptq", "--recipe", quick).exit_code == 130
    assert dry("ptq") == "ptq: would resume after block 1 of 2, /run/ptq.partial"
    assert dry("ptq", "--force") == "ptq: would write /run/ptq"
    assert "holds an unfinished run with other inputs:\n  ptq.rounds: 0 -> 1" in dry_refused("ptq", "ptq.rounds=1")
    monkeypatch.chdir(quick.parent)
    flip("run/ptq.partial/block_000.safetensors")(monkeypatch)
    assert "block_000.safetensors was changed since it was written" in dry_refused("ptq")


def test_a_stage_that_is_finished(ok, quick, dry, dry_refused, monkeypatch):
    assert "the ptq checkpoint in" in dry_refused("distill")
    ok("ptq", "--recipe", quick)
    assert dry("ptq") == "ptq: up to date, /run/ptq"
    assert dry("ptq", "--force") == "ptq: would write /run/ptq"
    assert "was made from other inputs:\n  ptq.damping: 0.01 -> 0.5" in dry_refused("ptq", "ptq.damping=0.5")
    assert dry("distill") == "distill-e2e: would go on from distill once that is written"
    assert dry("distill", "--only", "blocks") == "distill: would write /run/distill, from /run/ptq"
    assert "the distill checkpoint in" in dry_refused("distill", "--only", "end-to-end")
    assert "distill.end_to_end: " in dry_refused("distill", "distill.end_to_end.sequences=4000")
    ok("distill", "--recipe", quick, "--only", "blocks")
    assert dry("distill") == "distill-e2e: would write /run/distill-e2e, from /run/distill"
    assert dry("distill", "--force") == "distill-e2e: would go on from distill once that is written"
    monkeypatch.chdir(quick.parent)
    flip("run/distill/block_000.safetensors")(monkeypatch)
    assert "block_000.safetensors was changed since the stage finished" in dry_refused("distill", "--only", "blocks")


def test_an_export(ok, quick, dry, tmp_path):
    ok("ptq", "--recipe", quick)
    assert dry("export") == "export: would write /run/export, packed, from /run/ptq"
    ok("export", "--recipe", quick)
    assert dry("export") == "export: up to date, /run/export"
    assert dry("export", "--force") == "export: would write /run/export, packed, from /run/ptq"


def test_what_is_left_to_be_measured(ok, quick, dry):
    ok("ptq", "--recipe", quick)
    ok("eval", "--recipe", quick, "eval.checkpoints=[base]")
    assert dry("eval").startswith("eval: would measure ptq on novels ")
    ok("eval", "--recipe", quick)
    assert dry("eval") == "eval: up to date, /run/eval/results.json"
    assert dry("eval", "eval.tasks=['builtin:last_word']", "eval.limit=2") == "eval: would measure ptq on lbllm_last_word"
    assert dry("eval", "--force").startswith("eval: would measure ptq on novels ")


SAMPLED = "data.calibration.source=['generate:', chapter.txt]"


def test_sampled_text_is_compared_as_far_as_it_is_known(ok, quick, dry, dry_refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert dry("ptq", SAMPLED) == "ptq: would write /run/ptq"
    ok("ptq", "--recipe", quick, SAMPLED)
    assert dry("ptq", SAMPLED) == "ptq: up to date, /run/ptq"
    assert "ptq: would write" not in ok("distill", "--recipe", quick, SAMPLED, "--dry-run").stderr
    monkeypatch.setattr("lbllm_cli.models.sampling.sample_tokens", lambda *_: pytest.fail("sampled"))
    fewer = "  data.calibration.sequences: 6 -> 4\n"
    assert f"ptq was made from other inputs:\n{fewer}" in dry_refused("ptq", SAMPLED, "data.calibration.sequences=4")
    # Of a stage before it too.
    message = dry_refused("distill", SAMPLED, "data.calibration.sequences=4")
    assert f"ptq was made from other inputs than this recipe's:\n{fewer}" in message
    for file in (tmp_path / "run" / "generated").iterdir():
        file.unlink()
    assert dry("ptq", SAMPLED) == "ptq: up to date, /run/ptq, if the text that it would sample is the same"
    message = dry_refused("ptq", SAMPLED, "data.calibration.sequences=4", "data.calibration.length=16")
    assert f"ptq was made from other inputs:\n  data.calibration.length: 32 -> 16\n{fewer}" in message


def test_other_sources_are_read_before_text_is_sampled(dry_refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lbllm_cli.models.sampling.sample_tokens", lambda *_: pytest.fail("sampled"))
    (tmp_path / "short.txt").write_text("A short text. ", encoding="utf-8")
    assert "data.calibration: short.txt holds" in dry_refused("ptq", "data.calibration.source=['generate:', short.txt]")
