"""A stage folder: commit, resume, refuse, publish, and what a crash at any point leaves."""

import json
import os
from pathlib import Path

import pytest
import torch

from lbllm_cli.core import files, own_folders
from lbllm_cli.core.errors import UsageError
from lbllm_cli.core.fingerprint import fingerprint
from lbllm_cli.pipeline import checkpoint, stage_writer
from lbllm_cli.pipeline.checkpoint import MANIFEST, PROGRESS, Checkpoint
from lbllm_cli.pipeline.stage_record import block_file
from lbllm_cli.pipeline.stage_writer import StageWriter

INPUTS = {"stage": "ptq", "runtime.seed": 0, "ptq.group_size": 128}
OTHER = {"stage": "ptq", "runtime.seed": 1, "ptq.rounds": 2, "ptq.group_size": 128}
FACTS = {"parent": None, "group_size": 32, "blocks": 3, "parameters": 100, "binarized_parameters": 60, "tokens": 192}


class Crash(Exception):
    """Stands for the end of the process."""


def _block(index: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * seed + index)
    name = f"model.layers.{index}.self_attn.q_proj"
    return {
        f"{name}.weight": torch.randint(0, 255, (8, 4), generator=generator, dtype=torch.uint8),
        f"{name}.scale": torch.randn(8, 1, generator=generator).half().t(),  # not contiguous
    }


def _open(output: Path, inputs: dict = INPUTS, force: bool = False) -> StageWriter:
    writer = StageWriter(output, "ptq", inputs)
    assert writer.open(force)
    return writer


def _write(writer: StageWriter, last: int, seed: int = 0) -> None:
    for index in range(writer.blocks_done, last):
        writer.write_block(index, _block(index, seed))
        writer.commit(index)


def _finished(output: Path, inputs: dict = INPUTS, seed: int = 0, force: bool = False) -> Checkpoint:
    writer = _open(output, inputs, force)
    _write(writer, 3, seed)
    writer.finish(FACTS)
    return Checkpoint(output, "ptq")


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _holds(done: Checkpoint, seed: int) -> bool:
    return all(torch.equal(done.read_block(i)[name], tensor) for i in range(3) for name, tensor in _block(i, seed).items())


def test_a_stage_from_start_to_end(tmp_path):
    assert checkpoint.complete_stages(tmp_path) == []
    writer = _open(tmp_path)
    assert writer.blocks_done == 0
    back = writer.write_block(0, _block(0))
    assert all(torch.equal(back[name], tensor) for name, tensor in _block(0).items())
    assert writer.blocks_done == 0, "written is not committed"
    writer.commit(0)
    assert writer.blocks_done == 1
    _write(writer, 3)
    assert not (tmp_path / "ptq").exists()
    writer.finish(FACTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ptq"]
    assert sorted(_content(tmp_path / "ptq")) == [*(block_file(i) for i in range(3)), MANIFEST]

    done = Checkpoint(tmp_path, "ptq")
    done.verify()
    assert _holds(done, 0)
    assert done.inputs == INPUTS
    assert done.manifest["fingerprint"] == done.fingerprint == fingerprint(INPUTS)
    assert (done.manifest["blocks"], done.manifest["parent"]) == (3, None)
    assert done.hashes == {block_file(i): files.sha256(done.block_path(i)) for i in range(3)}
    entries = done.entries()
    assert set(entries) == {name for i in range(3) for name in _block(i)}
    assert entries["model.layers.1.self_attn.q_proj.weight"].file == done.block_path(1)
    assert checkpoint.complete_stages(tmp_path) == ["ptq"]


def test_a_complete_stage_is_recognised(tmp_path):
    _finished(tmp_path)
    before = _content(tmp_path)
    assert StageWriter(tmp_path, "ptq", INPUTS).open(force=False) is False
    assert _content(tmp_path) == before


def test_equal_runs_give_equal_bytes_also_when_interrupted(tmp_path):
    _finished(tmp_path / "straight")
    for last in (1, 2):
        writer = _open(tmp_path / "pieces")
        _write(writer, last)
        writer.write_block(last, _block(last, seed=9))  # not committed: written again after resuming
    writer = _open(tmp_path / "pieces")
    assert writer.blocks_done == 2
    writer.verify(3)
    assert all(torch.equal(writer.read_block(1)[name], tensor) for name, tensor in _block(1).items())
    _write(writer, 3)
    writer.finish(FACTS)
    assert _content(tmp_path / "pieces") == _content(tmp_path / "straight")


def test_an_unfinished_stage_is_not_a_checkpoint(tmp_path):
    with pytest.raises(UsageError, match=r"the ptq checkpoint in .* is not there; run: lbllm ptq"):
        Checkpoint(tmp_path, "ptq")
    _write(_open(tmp_path), 2)
    assert checkpoint.complete_stages(tmp_path) == []
    with pytest.raises(UsageError, match="is interrupted; run: lbllm ptq"):
        Checkpoint(tmp_path, "ptq")


def test_changed_inputs_are_refused_with_every_changed_key(tmp_path):
    _write(_open(tmp_path), 1)
    before = _content(tmp_path)
    expected = ["  ptq.rounds: absent -> 2", "  runtime.seed: 0 -> 1"]
    with pytest.raises(UsageError, match=r"ptq\.partial holds an unfinished run with other inputs") as caught:
        StageWriter(tmp_path, "ptq", OTHER).open(force=False)
    assert str(caught.value).splitlines()[1:-1] == expected
    assert "--force" in str(caught.value)
    assert _content(tmp_path) == before

    _finished(tmp_path, OTHER, force=True)
    before = _content(tmp_path)
    with pytest.raises(UsageError, match="ptq was made from other inputs") as caught:
        StageWriter(tmp_path, "ptq", INPUTS).open(force=False)
    assert str(caught.value).splitlines()[1:-1] == ["  ptq.rounds: 2 -> absent", "  runtime.seed: 1 -> 0"]
    assert _content(tmp_path) == before


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_damaged_record_is_refused_without_force(tmp_path, text):
    _write(_open(tmp_path), 1)
    (tmp_path / "ptq.partial" / PROGRESS).write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=r"progress\.json is damaged; run: lbllm ptq .*--force"):
        StageWriter(tmp_path, "ptq", INPUTS).open(force=False)
    assert _open(tmp_path, force=True).blocks_done == 0


def test_force_discards_an_unfinished_stage(tmp_path):
    _write(_open(tmp_path), 2)
    writer = _open(tmp_path, OTHER, force=True)
    assert writer.blocks_done == 0
    assert sorted(_content(writer.path)) == [PROGRESS]


def test_force_goes_on_with_what_force_began(tmp_path):
    _finished(tmp_path)
    first = _open(tmp_path, force=True)
    assert not first.resumes
    _write(first, 2)
    again = _open(tmp_path, force=True)
    assert (again.blocks_done, again.resumes) == (2, True)
    _write(again, 3)  # still of force: whoever comes third goes on as well
    assert _open(tmp_path, force=True).blocks_done == 3
    file = tmp_path / "ptq.partial" / block_file(1)
    file.write_bytes(b"damaged")
    assert _open(tmp_path, force=True).blocks_done == 0
    _write(_open(tmp_path, force=True), 1)
    assert _open(tmp_path, OTHER, force=True).blocks_done == 0


def test_a_finished_stage_is_not_given_up_for_an_abandoned_one(tmp_path):
    done = _finished(tmp_path)
    _write(_open(tmp_path, OTHER, force=True), 2)
    with pytest.raises(UsageError, match=r"ptq\.partial holds an unfinished run") as caught:
        StageWriter(tmp_path, "ptq", INPUTS).open(force=False)
    assert f"{done.path} is finished, with the inputs of this recipe; to keep it, delete" in str(caught.value)
    assert "--force" not in str(caught.value)


def test_force_keeps_a_finished_stage_until_it_is_replaced(tmp_path):
    _finished(tmp_path, INPUTS, seed=0)
    writer = _open(tmp_path, OTHER, force=True)
    _write(writer, 2, seed=1)
    assert _holds(Checkpoint(tmp_path, "ptq"), 0)

    writer = _open(tmp_path, OTHER)  # resumes; --force is not needed again
    assert writer.blocks_done == 2
    _write(writer, 3, seed=1)
    assert _holds(Checkpoint(tmp_path, "ptq"), 0)
    writer.finish(FACTS)
    assert _holds(Checkpoint(tmp_path, "ptq"), 1)
    assert Checkpoint(tmp_path, "ptq").inputs == OTHER
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ptq"]


def test_force_makes_the_same_stage_again(tmp_path):
    _finished(tmp_path)
    before = _content(tmp_path)
    writer = _open(tmp_path, force=True)
    assert writer.blocks_done == 0
    _write(writer, 3)
    writer.finish(FACTS)
    assert _content(tmp_path) == before


def _crash_at(monkeypatch, step: str, number: int) -> None:
    """The process ends instead of the number-th rename of a folder, or instead of removing the progress file."""
    rename, unlink, renames = os.rename, Path.unlink, []

    def renaming(source: Path, target: Path) -> None:
        renames.append(target)
        if step == "rename" and len(renames) == number:
            raise Crash
        rename(source, target)

    def unlinking(path: Path, missing_ok: bool = False) -> None:
        if step == "unlink" and path.name == PROGRESS:
            raise Crash
        unlink(path, missing_ok)

    monkeypatch.setattr(stage_writer.os, "rename", renaming)
    monkeypatch.setattr(Path, "unlink", unlinking)


@pytest.mark.parametrize(
    ("replacing", "step", "number"),
    [
        (False, "unlink", 1),
        (False, "rename", 1),
        (True, "rename", 1),
        (True, "unlink", 1),
        (True, "rename", 2),
    ],
)
def test_a_crash_while_publishing_loses_nothing(tmp_path, monkeypatch, replacing, step, number):
    if replacing:
        _finished(tmp_path, OTHER, seed=1)
    writer = _open(tmp_path, INPUTS, force=True)
    _write(writer, 3)
    with monkeypatch.context() as patch:
        _crash_at(patch, step, number)
        with pytest.raises(Crash):
            writer.finish(FACTS)
    assert any((tmp_path / folder / MANIFEST).exists() for folder in ("ptq", "ptq.partial"))

    assert StageWriter(tmp_path, "ptq", INPUTS).open(force=False) is False
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ptq"]
    done = Checkpoint(tmp_path, "ptq")
    done.verify()
    assert _holds(done, 0)
    assert sorted(_content(done.path)) == [*(block_file(i) for i in range(3)), MANIFEST]


def test_a_folder_left_by_an_earlier_replacement_is_in_no_way(tmp_path):
    _finished(tmp_path, OTHER, seed=1)
    left = tmp_path / "ptq.replaced"
    left.mkdir()
    (left / "block_000.safetensors").write_bytes(b"old")
    assert _holds(_finished(tmp_path, INPUTS, force=True), 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ptq"]


def test_a_crash_while_committing_keeps_what_was_committed(tmp_path, monkeypatch):
    writer = _open(tmp_path)
    _write(writer, 1)
    writer.write_block(1, _block(1))

    def crash(*_: object) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", crash)
        with pytest.raises(Crash):
            writer.commit(1)
    again = _open(tmp_path)
    assert again.blocks_done == 1
    again.verify(3)


@pytest.mark.parametrize("change", ["flip", "cut", "remove"])
def test_a_block_changed_after_the_end_is_named(tmp_path, change):
    done = _finished(tmp_path)
    file = done.block_path(1)
    content = file.read_bytes()
    if change == "remove":
        file.unlink()
    else:
        file.write_bytes(content[:-1] if change == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    for use in (done.verify, lambda: done.read_block(1), lambda: StageWriter(tmp_path, "ptq", INPUTS).open(force=False)):
        with pytest.raises(UsageError, match=r"block_001\.safetensors was changed since the stage finished .*--force"):
            use()
    assert len(done.read_block(0)) == 2
    assert _holds(_finished(tmp_path, force=True), 0)


def test_a_committed_block_changed_before_resuming_is_named(tmp_path):
    _write(_open(tmp_path), 2)
    file = tmp_path / "ptq.partial" / block_file(0)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(
        UsageError, match=r"block_000\.safetensors was changed since it was written; start again: lbllm ptq --recipe "
    ):
        _open(tmp_path).verify(3)


def test_force_starts_again_after_a_damaged_block_as_the_message_says(tmp_path):
    _write(_open(tmp_path), 2)
    (tmp_path / "ptq.partial" / block_file(0)).unlink()
    writer = _open(tmp_path, force=True)
    writer.verify(3)
    assert writer.blocks_done == 0


def _without_first(files: dict) -> dict:
    return {name: found for name, found in files.items() if name != block_file(0)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_without_first, "expected 1 blocks from block_000.safetensors on"),
        (lambda files: files | {"block_004.safetensors": "0" * 64}, "block_004.safetensors"),
        (lambda files: files | {"../../outside": "0" * 64}, "'../../outside'"),
        (lambda files: files | {block_file(1): 7}, "files.block_001.safetensors: input should be a valid string, got '7'"),
        (lambda files: files | {block_file(1): "abc"}, "files.block_001.safetensors"),
        (lambda files: list(files), "files: input should be a valid dictionary"),
        (lambda files: None, "files: input should be a valid dictionary"),
    ],
)
def test_a_progress_file_that_lbllm_did_not_write_is_refused_with_the_reason(tmp_path, change, reason):
    _write(_open(tmp_path), 2)
    progress = tmp_path / "ptq.partial" / PROGRESS
    record = json.loads(progress.read_text(encoding="utf-8"))
    progress.write_text(json.dumps(record | {"files": change(record["files"])}), encoding="utf-8")
    with pytest.raises(UsageError, match=r"progress\.json is damaged; run: lbllm ptq .*--force") as caught:
        StageWriter(tmp_path, "ptq", INPUTS).open(force=False)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"inputs": []}, {"inputs": {"a": {"b": 1}}}, {"files": {}}, {"files": {"block_000.safetensors": "0" * 64}}, {"blocks": 2},
        {"blocks": "3"}, {"blocks": 2**70}, {"parent": "ptq"}, {"parent": {"stage": "other", "fingerprint": ""}},
        {"parent": {"stage": "distill", "fingerprint": ""}}, {"group_size": None}, {"group_size": 0}, {"parameters": 0},
        {"activations": {"bits": 4}}, {"activations": [4]}, {"stage": "distill"}, {"format_version": "1"},
        {"format_version": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_manifest_with_values_of_other_kinds_is_refused(tmp_path, change):
    done = _finished(tmp_path)
    (done.path / MANIFEST).write_text(json.dumps(done.manifest | change), encoding="utf-8")
    for use in (lambda: Checkpoint(tmp_path, "ptq"), lambda: StageWriter(tmp_path, "ptq", INPUTS).open(force=False)):
        with pytest.raises(UsageError, match=rf"{MANIFEST} is damaged; run: lbllm ptq .*--force"):
            use()
    assert _holds(_finished(tmp_path, force=True), 0)


@pytest.mark.parametrize("content", [b"\xff\xfe{}", b"[" * 100_000, b'{"inputs": {"a": 1'], ids=["bytes", "deep", "cut"])
def test_a_record_that_is_no_json_is_refused(tmp_path, content):
    _write(_open(tmp_path), 1)
    (tmp_path / "ptq.partial" / PROGRESS).write_bytes(content)
    with pytest.raises(UsageError, match=r"progress\.json is damaged; run"):
        StageWriter(tmp_path, "ptq", INPUTS).open(force=False)
    done = _finished(tmp_path, force=True)
    (done.path / MANIFEST).write_bytes(content)
    with pytest.raises(UsageError, match=rf"{MANIFEST} is damaged; run"):
        Checkpoint(tmp_path, "ptq")


def test_a_stage_that_was_about_to_be_put_in_place_is_verified_first(tmp_path, monkeypatch):
    writer = _open(tmp_path)
    _write(writer, 3)
    with monkeypatch.context() as patch:
        _crash_at(patch, "rename", 1)
        with pytest.raises(Crash):
            writer.finish(FACTS)
    (tmp_path / "ptq.partial" / block_file(1)).write_bytes(b"")
    with pytest.raises(UsageError, match=r"block_001\.safetensors was changed since it was written"):
        StageWriter(tmp_path, "ptq", INPUTS).open(force=False)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"inputs": {}, "files": {}}'])
def test_a_damaged_manifest_is_refused(tmp_path, text):
    done = _finished(tmp_path)
    (done.path / MANIFEST).write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=rf"{MANIFEST} is damaged; run: lbllm ptq .*--force"):
        Checkpoint(tmp_path, "ptq")


def test_another_format_version_is_refused(tmp_path):
    done = _finished(tmp_path)
    (done.path / MANIFEST).write_text(json.dumps(done.manifest | {"format_version": 7}), encoding="utf-8")
    with pytest.raises(UsageError, match="has format_version 7, this lbllm reads 6"):
        Checkpoint(tmp_path, "ptq")


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("place", ["ptq", "ptq.partial", "ptq.replaced", "ptq/streams"])
@pytest.mark.parametrize("kind", ["alone", "beside"])
def test_a_file_of_the_users_is_never_deleted(tmp_path, force, place, kind):
    if kind == "beside":
        _finished(tmp_path, OTHER, force=True)
        if place in ("ptq.partial", "ptq.replaced"):
            (tmp_path / "ptq").rename(tmp_path / place)
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    (tmp_path / place / "notes.txt").write_text("mine", encoding="utf-8")
    before = _content(tmp_path)
    # One that would not be replaced is refused as ever: for its inputs.
    replaced = (kind, place, force) != ("beside", "ptq", False)
    expected = r"holds (streams/, which )?(holds )?notes\.txt: .* move it away" if replaced else "was made from other inputs"
    with pytest.raises(UsageError, match=expected) as caught:
        StageWriter(tmp_path, "ptq", INPUTS).open(force)
    assert str(tmp_path / place).removesuffix("/streams") in str(caught.value)
    assert _content(tmp_path) == before


@pytest.mark.parametrize("name", ["loss.png", "events.jsonl", "environment.json", "training.safetensors", "progress.json"])
def test_names_that_anybody_uses_do_not_make_a_stage(tmp_path, name):
    (tmp_path / "ptq").mkdir()
    (tmp_path / "ptq" / name).write_text("mine", encoding="utf-8")
    with pytest.raises(UsageError, match="nothing that only lbllm writes"):
        StageWriter(tmp_path, "ptq", INPUTS).open(force=True)


@pytest.mark.parametrize("place", ["ptq", "ptq.partial", "ptq.replaced", "ptq.partial/streams"])
def test_a_file_or_a_link_for_a_folder_stays(tmp_path, place):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("mine", encoding="utf-8")
    with pytest.raises(UsageError, match=r"is a file|holds streams"):
        StageWriter(tmp_path, "ptq", INPUTS).open(force=True)
    (tmp_path / place).unlink()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "notes.txt").write_text("mine", encoding="utf-8")
    (tmp_path / place).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=r"is a link|holds streams"):
        StageWriter(tmp_path, "ptq", INPUTS).open(force=True)
    assert (tmp_path / "elsewhere" / "notes.txt").exists()


def test_what_a_user_puts_into_a_stage_while_it_is_made_again_is_kept(tmp_path):
    _finished(tmp_path, OTHER, seed=1)
    writer = _open(tmp_path, force=True)
    _write(writer, 3)
    notes = tmp_path / "ptq" / "notes.txt"
    notes.write_text("mine", encoding="utf-8")
    with pytest.raises(UsageError, match=r"holds notes\.txt"):
        writer.finish(FACTS)
    assert _holds(Checkpoint(tmp_path, "ptq"), 1)
    notes.rename(tmp_path / "notes.txt")
    assert StageWriter(tmp_path, "ptq", INPUTS).open(force=False) is False
    assert _holds(Checkpoint(tmp_path, "ptq"), 0)


def test_a_deletion_that_is_killed_goes_on(tmp_path, monkeypatch):
    _finished(tmp_path, OTHER, seed=1)
    unlink, deleted = os.unlink, []

    def crash(path: Path) -> None:
        deleted.append(path)
        if len(deleted) == 2:
            raise Crash
        unlink(path)

    writer = _open(tmp_path, force=True)
    _write(writer, 3)
    with monkeypatch.context() as patch:
        patch.setattr(own_folders.os, "unlink", crash)
        with pytest.raises(Crash):
            writer.finish(FACTS)
    assert (tmp_path / "ptq.replaced").exists()
    assert StageWriter(tmp_path, "ptq", INPUTS).open(force=False) is False
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ptq"]
