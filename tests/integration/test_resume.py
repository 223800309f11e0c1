"""A killed and resumed run equals the uninterrupted one, file hash by file hash, wherever it was killed."""

import json
import os
import re
import shutil
import signal

import pytest
import torch
from conftest import write_recipe
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stages import hashes, promised

from lbllm_cli.pipeline import block_loop as stream
from lbllm_cli.pipeline.stage_writer import StageWriter
from lbllm_cli.pipeline.training_state import TrainingState


def die_in(where: str, block: int) -> None:
    """In a child process: makes the run end by SIGKILL at one instant of one block."""

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    write, commit, finish = StageWriter.write_block, StageWriter.commit, StageWriter.finish
    if where == "before write":
        StageWriter.write_block = lambda self, index, tensors: kill() if index == block else write(self, index, tensors)
    elif where == "after write":
        StageWriter.commit = lambda self, index: kill() if index == block else commit(self, index)
    elif where == "after commit":
        StageWriter.commit = lambda self, index: (commit(self, index), kill() if index == block else None)
    elif where == "before manifest":
        StageWriter.finish = lambda self, facts: kill()
    elif where == "before publishing":
        # The one folder that is renamed here: nothing is replaced.
        os.rename = lambda folder, place: kill()
    elif where == "after publishing":
        StageWriter.finish = lambda self, facts: (finish(self, facts), kill())
    elif where == "half a student pass":
        put = stream.Sink.put

        def putting(sink, rows, hidden) -> None:
            put(sink, rows, hidden)
            if re.search(rf"quantized_{block + 1:03d}\b", str(sink.stream.path)):
                kill()

        stream.Sink.put = putting
    elif where == "before the second manifest":
        StageWriter.finish = lambda self, facts: kill() if self.stage == "distill-e2e" else finish(self, facts)
    elif where == "SIGTERM while finishing":
        StageWriter.finish = lambda self, facts: (finish(self, facts), os.kill(os.getpid(), signal.SIGTERM))
    elif where == "while restoring":
        move = stream.HiddenStream.move
        stream.HiddenStream.move = lambda self, path: (move(self, path), kill())


def run_in_child(arguments: list[str], where: str = "", block: int = 0) -> int:
    """Exit status of `lbllm` in a forked child (a fresh process would import torch for seconds); -9 when killed."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        from lbllm_cli.cli.app import app

        if where:
            die_in(where, block)
        try:
            app(arguments, standalone_mode=True)
        except SystemExit as end:
            os._exit(int(end.code or 0))
        os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture(scope="module")
def setting(tmp_path_factory, request):
    """Toy and the uninterrupted run's hashes, with streams in RAM and on disk."""
    from conftest import save_toy

    base = tmp_path_factory.mktemp("resume")
    toy = save_toy(base / "model")
    expected = {}
    for streams in ("ram", "disk"):
        recipe = write_recipe(base / f"{streams}.yaml", toy, base / streams, runtime={"streams": streams})
        assert run_in_child(["ptq", "--recipe", str(recipe)]) == 0
        # The resolved recipe names the folder and where streams lie.
        expected[streams] = {k: v for k, v in hashes(base / streams / "ptq").items() if k != "recipe.resolved.yaml"}
    return toy, expected


def test_streams_in_ram_and_on_disk_give_the_same_bytes(setting):
    _, expected = setting
    assert expected["ram"] == expected["disk"]
    assert len(expected["ram"]) == 4  # three blocks and the manifest: no stream file is left


@pytest.mark.parametrize("streams", ["ram", "disk"])
@pytest.mark.parametrize(
    ("where", "block"),
    [
        ("before write", 1),
        ("after write", 0),
        ("after write", 2),
        ("after commit", 1),
        ("before manifest", 0),
        ("before publishing", 0),
        ("after publishing", 0),
    ],
)
def test_killed_and_resumed_equals_uninterrupted(setting, tmp_path, streams, where, block):
    toy, expected = setting
    recipe = write_recipe(tmp_path / "r.yaml", toy, tmp_path / "run", runtime={"streams": streams})
    command = ["ptq", "--recipe", str(recipe)]
    assert run_in_child(command, where, block) == -signal.SIGKILL
    assert run_in_child(command) == 0
    found = {k: v for k, v in hashes(tmp_path / "run" / "ptq").items() if k != "recipe.resolved.yaml"}
    assert found == expected[streams]
    assert not (tmp_path / "run" / "ptq.partial").exists()


@pytest.mark.parametrize(("where", "block"), [("after commit", 1), ("before manifest", 0)])
def test_every_block_has_its_record_and_none_is_passed_again(setting, tmp_path, lbllm, where, block):
    recipe = write_recipe(tmp_path / "r.yaml", setting[0], tmp_path / "run", runtime={"streams": "disk"})
    command = ["ptq", "--recipe", str(recipe)]
    assert run_in_child(command, where, block) == -signal.SIGKILL
    resumed = lbllm(*command)
    assert resumed.exit_code == 0
    assert "advancing" not in resumed.stderr
    lines = (tmp_path / "run" / "ptq" / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["block"] for line in lines] == [0, 1, 2]


def test_killed_twice_the_second_time_while_restoring_on_disk(setting, tmp_path):
    toy, expected = setting
    recipe = write_recipe(tmp_path / "r.yaml", toy, tmp_path / "run", runtime={"streams": "ram"})
    assert run_in_child(["ptq", "--recipe", str(recipe)], "after commit", 1) == -signal.SIGKILL
    on_disk = ["ptq", "--recipe", str(recipe), "runtime.streams=disk"]
    assert run_in_child(on_disk, "while restoring") == -signal.SIGKILL
    assert run_in_child(on_disk) == 0
    found = {k: v for k, v in hashes(tmp_path / "run" / "ptq").items() if k != "recipe.resolved.yaml"}
    assert found == expected["ram"]


def test_half_a_stream_on_disk_is_not_gone_on_from_after_a_run_in_ram(setting, tmp_path):
    """What was killed in the middle of a pass has a file of the right size; a run in memory commits the block anew."""
    toy, expected = setting
    recipe = write_recipe(tmp_path / "r.yaml", toy, tmp_path / "run", runtime={"streams": "disk"})
    on_disk = ["ptq", "--recipe", str(recipe)]
    streams = tmp_path / "run" / "ptq.partial" / "streams"
    assert run_in_child(on_disk, "half a student pass", 0) == -signal.SIGKILL
    assert {"quantized_000.bin", "unfinished_quantized_001.bin"} <= {file.name for file in streams.iterdir()}
    assert not (streams / "quantized_001.bin").exists()
    assert run_in_child([*on_disk, "runtime.streams=ram"], "after commit", 0) == -signal.SIGKILL
    assert not list(streams.iterdir()), "streams of an attempt that somebody else has gone on from"
    assert run_in_child(on_disk) == 0
    found = {k: v for k, v in hashes(tmp_path / "run" / "ptq").items() if k != "recipe.resolved.yaml"}
    assert found == expected["ram"]


def test_a_resumed_run_cuts_its_passes_as_the_first_one(setting, tmp_path, lbllm, monkeypatch):
    """Of another number of rows a GPU may multiply in another order, and last bits differ. 9 rows, of which 2 are held out."""
    toy, _ = setting
    recipe = write_recipe(tmp_path / "r.yaml", toy, tmp_path / "run", runtime={"batch_size": 4, "streams": "ram"})
    command = ["ptq", "--recipe", str(recipe), "data.calibration.sequences=9"]
    put, seen = stream.Sink.put, []
    monkeypatch.setattr(stream.Sink, "put", lambda self, rows, values: (seen.append(rows), put(self, rows, values))[1])
    assert lbllm(*command).exit_code == 0
    assert seen[:3] == [slice(0, 4), slice(4, 8), slice(8, 9)]  # embeddings
    first = [rows for rows in seen if rows.stop == 7]
    assert first, "nothing was cut where the rows that are held out begin"
    shutil.rmtree(tmp_path / "run")
    assert run_in_child(command, "after commit", 0) == -signal.SIGKILL
    seen.clear()
    assert lbllm(*command).exit_code == 0
    # Of two blocks of three, and block 0's teacher once more.
    assert len([rows for rows in seen if rows.stop == 7]) == 2 * len(first) // 3 + 1


def test_a_signal_while_a_phase_is_finished_does_not_begin_the_next(setting, tmp_path):
    toy, _ = setting
    phase = {"epochs": 1, "end_to_end": {"sequences": 4, "epochs": 1}}
    recipe = write_recipe(tmp_path / "r.yaml", toy, tmp_path / "run", distill=phase)
    assert run_in_child(["ptq", "--recipe", str(recipe)]) == 0
    assert run_in_child(["distill", "--recipe", str(recipe)], "SIGTERM while finishing") == 130
    assert (tmp_path / "run" / "distill" / "lbllm_stage.json").exists()
    assert not list((tmp_path / "run").glob("distill-e2e*"))


def test_a_command_with_force_that_was_stopped_goes_on_when_it_is_given_again(setting, tmp_path, lbllm):
    """As batch jobs come back. A finished phase is not made a third time, an unfinished one goes on."""
    toy, _ = setting
    phase = {"epochs": 1, "end_to_end": {"sequences": 4, "epochs": 1}}
    recipe = write_recipe(tmp_path / "r.yaml", toy, tmp_path / "run", distill=phase)
    for command in ("ptq", "distill"):
        assert run_in_child([command, "--recipe", str(recipe)]) == 0
    expected = {name: promised(tmp_path / "run" / name) for name in ("distill", "distill-e2e")}
    forced = ["distill", "--recipe", str(recipe), "--force"]
    assert run_in_child(forced, "after commit", 1) == -signal.SIGKILL
    assert run_in_child(forced, "before manifest") == -signal.SIGKILL  # of the first phase
    told = lbllm(*forced)
    assert told.exit_code == 0
    assert "going on with the run that --force began; to begin it again delete" in told.stderr
    assert {name: promised(tmp_path / "run" / name) for name in expected} == expected

    assert run_in_child(forced, "before the second manifest") == -signal.SIGKILL
    told = lbllm(*forced)
    assert told.exit_code == 0
    assert "distill: up to date" in told.stderr
    assert {name: promised(tmp_path / "run" / name) for name in expected} == expected
    assert not (tmp_path / "run" / "distill" / "progress.json").exists()

    # Stopped before the second phase has a folder, as while its text is sampled.
    assert run_in_child(forced, "before the second manifest") == -signal.SIGKILL
    shutil.rmtree(tmp_path / "run" / "distill-e2e.partial")
    assert "distill: up to date" in lbllm(*forced, "--dry-run").stderr
    # The phase alone is begun again by force, as it is by a command that was not stopped.
    assert "distill: would write" in lbllm(*forced, "--only", "blocks", "--dry-run").stderr
    # What it was stopped with is no longer asked for: --force replaces it, and does not name itself as the remedy.
    told = lbllm(*forced, "distill.lr_weights=0.01")
    assert told.exit_code == 0, told.stderr
    assert "distill: up to date" not in told.stderr
    assert not (tmp_path / "run" / "distill" / "progress.json").exists()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_with_130_and_resume(setting, tmp_path, signum):
    toy, expected = setting
    recipe = write_recipe(tmp_path / "r.yaml", toy, tmp_path / "run")
    command = ["ptq", "--recipe", str(recipe)]
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        commit = StageWriter.commit
        StageWriter.commit = lambda self, index: (commit(self, index), os.kill(os.getpid(), signum) if index == 1 else None)
        from lbllm_cli.cli.app import app

        try:
            app(command, standalone_mode=True)
        except SystemExit as end:
            os._exit(int(end.code or 0))
        os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    assert not (tmp_path / "run" / "ptq").exists()
    assert run_in_child(command) == 0
    found = {k: v for k, v in hashes(tmp_path / "run" / "ptq").items() if k != "recipe.resolved.yaml"}
    assert found == expected["ram"]


def test_changed_recipe_is_refused_while_unfinished_and_force_starts_again(setting, tmp_path, lbllm):
    toy, expected = setting
    recipe = write_recipe(tmp_path / "r.yaml", toy, tmp_path / "run")
    assert run_in_child(["ptq", "--recipe", str(recipe)], "after commit", 0) == -signal.SIGKILL
    refused = lbllm("ptq", "--recipe", recipe, "ptq.group_size=48")
    assert refused.exit_code == 2
    assert "ptq.group_size: 32 -> 48" in refused.stderr
    assert lbllm("ptq", "--recipe", recipe, "ptq.group_size=48", "--force").exit_code == 0
    changed = hashes(tmp_path / "run" / "ptq")
    assert changed["block_000.safetensors"] != expected["ram"]["block_000.safetensors"]


def test_devices_logging_and_eval_do_not_change_the_fingerprint(setting, tmp_path, ok):
    toy, _ = setting
    recipe = write_recipe(tmp_path / "r.yaml", toy, tmp_path / "run")
    ok("ptq", "--recipe", recipe)
    again = ok("ptq", "--recipe", recipe, "runtime.streams=disk", "runtime.device=cpu", "eval.checkpoints=[base]")
    assert "up to date" in again.stderr


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A distillation that a signal stopped in the middle of its second block: folder and command."""
    from conftest import save_toy

    folder = tmp_path_factory.mktemp("stopped")
    short = {"epochs": 1, "batch_size": 4}
    recipe = write_recipe(folder / "r.yaml", save_toy(folder / "model"), folder / "run", distill=short)
    assert run_in_child(["ptq", "--recipe", str(recipe)]) == 0
    command = ["distill", "--recipe", str(recipe)]
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        import torch

        step, calls = torch.optim.AdamW.step, []

        def stop(self):
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(self)

        torch.optim.AdamW.step = stop
        from lbllm_cli.cli.app import app

        try:
            app(command, standalone_mode=True)
        except SystemExit as end:
            os._exit(int(end.code or 0))
        os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    assert (folder / "run" / "distill.partial" / "training.safetensors").exists()
    return folder, command


def _facts(change):
    """Changes what the header of a kept training says."""

    def spoil(tensors, facts):
        return tensors, change(facts)

    return spoil


def _first(tensors: dict) -> str:
    return next(name for name in sorted(tensors) if name.endswith("exp_avg"))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_facts(lambda facts: None), "its header does not say"),
        (_facts(lambda facts: [1]), "its header does not say"),
        (_facts(lambda facts: {**facts, "block": "1"}), "its header does not say"),
        (_facts(lambda facts: {**facts, "epoch": [1]}), "epoch: input should be a valid integer"),
        (_facts(lambda facts: {**facts, "epoch": 7}), "epoch 7"),
        (_facts(lambda facts: {**facts, "step": -1}), "step -1"),
        (_facts(lambda facts: {**facts, "start": {}}), "the errors of its start are missing"),
        (_facts(lambda facts: {**facts, "epochs": [{}, {}]}), "2 records of 0 epochs"),
        (_facts(lambda facts: {**facts, "colour": 1}), "colour is of no training"),
        (lambda tensors, facts: ({k: v for k, v in tensors.items() if k != _first(tensors)}, facts), "exp_avg is missing"),
        (lambda tensors, facts: ({**tensors, "9.9/value": torch.zeros(1)}, facts), "9.9/value is of no training"),
        (lambda tensors, facts: ({**tensors, _first(tensors): torch.zeros(3)}, facts), "exp_avg is torch.float32 [3], expected"),
        (lambda tensors, facts: ({**tensors, _first(tensors): tensors[_first(tensors)].double()}, facts), "is torch.float64"),
    ],
    ids=range(13),
)
def test_a_kept_training_that_is_of_another_is_refused(stopped, lbllm, spoil, reason):
    folder, command = stopped
    file = folder / "run" / "distill.partial" / "training.safetensors"
    before = file.read_bytes()
    with safe_open(file, "pt") as handle:
        facts = json.loads(handle.metadata()["facts"])
    tensors, facts = spoil(load_file(file), facts)
    try:
        TrainingState(file.parent, 1).save(tensors, facts)
        result = lbllm(*command)
    finally:
        file.write_bytes(before)
    assert result.exit_code == 2
    assert f"{file} is damaged (" in result.stderr
    assert reason in result.stderr
    assert "delete it and run the same command again" in result.stderr


@pytest.mark.parametrize(
    "content", [b"", b"x" * 100, (8).to_bytes(8, "little") + b"{}      ", (5).to_bytes(8, "little") + b"[1,2]"], ids=range(4)
)
def test_a_kept_training_that_is_no_such_file(stopped, lbllm, content):
    folder, command = stopped
    file = folder / "run" / "distill.partial" / "training.safetensors"
    before = file.read_bytes()
    try:
        file.write_bytes(content)
        result = lbllm(*command)
    finally:
        file.write_bytes(before)
    assert result.exit_code == 2
    assert f"{file} is damaged (" in result.stderr


def test_values_of_a_kept_training_that_were_changed(stopped, lbllm):
    folder, command = stopped
    file = folder / "run" / "distill.partial" / "training.safetensors"
    before = file.read_bytes()
    with safe_open(file, "pt") as handle:
        metadata = handle.metadata()
    changed = {name: tensor * 1.01 if tensor.is_floating_point() else tensor for name, tensor in load_file(file).items()}
    try:
        save_file(changed, file, metadata=metadata)
        result = lbllm(*command)
    finally:
        file.write_bytes(before)
    assert result.exit_code == 2
    assert f"{file} is damaged (it was changed since it was written); delete it" in result.stderr


def test_training_kept_by_a_version_without_hashes_is_gone_on_from(stopped, ok, tmp_path):
    folder, command = stopped
    shutil.copytree(folder / "run", tmp_path / "run")
    file = tmp_path / "run" / "distill.partial" / "training.safetensors"
    with safe_open(file, "pt") as handle:
        facts = handle.metadata()["facts"]
    save_file(load_file(file), file, metadata={"facts": facts})
    kept = TrainingState(file.parent, 1).load(1)
    assert kept is not None
    assert kept[1] == json.loads(facts)
    ok(*command, f"output.dir={tmp_path / 'run'}")


def test_deleting_a_damaged_training_costs_only_itself(stopped, ok, tmp_path):
    folder, command = stopped
    shutil.copytree(folder / "run", tmp_path / "run")
    (tmp_path / "run" / "distill.partial" / "training.safetensors").unlink()
    result = ok(*command, f"output.dir={tmp_path / 'run'}")
    assert "resuming after block 1 of 3" in result.stderr


@pytest.mark.parametrize("change", [lambda it: it[:-100], lambda it: it + b"\0" * 4, lambda it: b""], ids=range(3))
def test_a_stream_of_another_length_is_not_gone_on_from(setting, tmp_path, lbllm, change):
    toy, expected = setting
    recipe = write_recipe(tmp_path / "r.yaml", toy, tmp_path / "run", runtime={"streams": "disk"})
    command = ["ptq", "--recipe", str(recipe)]
    assert run_in_child(command, "after commit", 1) == -signal.SIGKILL
    streams = tmp_path / "run" / "ptq.partial" / "streams"
    file = streams / "quantized_002.bin"
    file.write_bytes(change(file.read_bytes()))
    result = lbllm(*command)
    assert result.exit_code == 2
    assert f"{file} is damaged" in result.stderr
    assert f"delete {streams} and run the same command again" in result.stderr
    shutil.rmtree(streams)
    assert run_in_child(command) == 0
    assert {k: v for k, v in hashes(tmp_path / "run" / "ptq").items() if k != "recipe.resolved.yaml"} == expected["disk"]
