"""Stage 2 on toys: exact start, never worse, resume in the middle of a block, records, and what is refused."""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from conftest import save_toy, write_recipe
from safetensors.torch import load_file, save_file
from stages import BLOCKS, block_bytes, events, promised, refused, run_in_pieces

from lbllm_cli.core.errors import Interrupted
from lbllm_cli.format.weights import PackedWeight
from lbllm_cli.models.model import open_model
from lbllm_cli.models.stored import stored_block
from lbllm_cli.pipeline.checkpoint import Checkpoint
from lbllm_cli.pipeline.training_state import TrainingState
from lbllm_cli.recipe.load import load_recipe
from lbllm_cli.training import loop as training
from lbllm_cli.training.block import BlockObjective
from lbllm_cli.training.loop import TrainingLoop

# Enough text for training to pay; the recipe's own 9 sequences are for what is about something else.
MORE = "data.training.sequences=160"


@pytest.fixture(scope="session")
def parent(finished) -> tuple[Path, Path]:
    """Toy model and an output folder that holds its finished ptq stage."""
    return finished("ptq")


@pytest.fixture
def run(parent, tmp_path):
    """run(**distill settings): a recipe whose output folder holds the finished ptq stage."""
    toy, output = parent
    shutil.copytree(output / "ptq", tmp_path / "run" / "ptq")

    def recipe(name: str = "r", **distill) -> Path:
        return write_recipe(tmp_path / f"{name}.yaml", toy, tmp_path / "run", distill={"epochs": 2, **distill})

    return recipe


@pytest.mark.parametrize("parametrisation", ["nearest", "bitmap"])
def test_no_epochs_return_the_parent_byte_for_byte(ok, run, tmp_path, parametrisation):
    assert "no epoch was better" not in ok("distill", "--recipe", run(epochs=0, parametrisation=parametrisation)).stderr
    assert block_bytes(tmp_path / "run" / "distill") == block_bytes(tmp_path / "run" / "ptq")
    manifest = json.loads((tmp_path / "run" / "distill" / "lbllm_stage.json").read_text())
    assert manifest["parent"]["fingerprint"] == Checkpoint(tmp_path / "run", "ptq").fingerprint


@pytest.mark.parametrize("parametrisation", ["nearest", "bitmap"])
def test_training_lowers_the_held_out_error_of_every_block(ok, run, tmp_path, parametrisation):
    ok("distill", "--recipe", run(epochs=3, parametrisation=parametrisation), MORE)
    records = events(tmp_path / "run" / "distill")
    assert [record["block"] for record in records] == [0, 1, 2]
    for record in records:
        assert record["after"]["error_ordinary"] <= record["before"]["error_ordinary"]
    # Measured 0.744 (nearest) and 0.764 (bitmap) on the average block.
    gains = [record["after"]["error_ordinary"] / record["before"]["error_ordinary"] for record in records]
    assert sum(gains) / 3 < 0.85
    assert block_bytes(tmp_path / "run" / "distill") != block_bytes(tmp_path / "run" / "ptq")


def test_an_epoch_is_kept_as_the_mean_of_its_steps(ok, run, tmp_path):
    kept = {}
    for name, decay in (("last", None), ("nothing is left", 0.0), ("mean", 0.9)):
        ok("distill", "--recipe", run(epochs=1, ema_decay=decay), "data.training.sequences=32")
        kept[name] = block_bytes(tmp_path / "run" / "distill")
        shutil.rmtree(tmp_path / "run" / "distill")
    # A mean that keeps nothing of the steps before is the last state.
    assert kept["last"] == kept["nothing is left"] != kept["mean"]


def test_rates_that_ruin_everything_return_the_parent(ok, run, tmp_path):
    log = ok("distill", "--recipe", run(lr_weights=1.0, lr_levels=1.0)).stderr
    assert log.count("no epoch was better") == 3
    assert [record["best_epoch"] for record in events(tmp_path / "run" / "distill")] == [0, 0, 0]
    assert block_bytes(tmp_path / "run" / "distill") == block_bytes(tmp_path / "run" / "ptq")


def test_a_cap_on_channels_leaves_more_of_the_fit_to_the_others(ok, tmp_path):
    """Of a model whose stream has one huge channel, as Gemma's have."""
    toy = save_toy(tmp_path / "toy")
    weights = load_file(toy / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight[3] *= 100
    save_file(weights, toy / "model.safetensors", {"format": "pt"})
    errors = {}
    for cap in (None, 10.0):
        recipe = write_recipe(tmp_path / "r.yaml", toy, tmp_path / "run", distill={"epochs": 2, "channel_cap": cap})
        ok("ptq", "--recipe", recipe)
        ok("distill", "--recipe", recipe, MORE, "runtime.streams=ram", "--force")
        model = open_model(load_recipe(recipe, []).model, torch.device("cpu"))
        tokens = torch.arange(64).reshape(2, 32) * 3 + 1
        teacher = student = model.embed()(tokens)
        checkpoint = Checkpoint(tmp_path / "run", "distill")
        for index in range(model.blocks):
            teacher = model.block(index)(teacher)
            student = stored_block(model, index, checkpoint.read_block(index), None)(student)
        others = torch.arange(teacher.shape[-1]) != 3
        errors[cap] = float((student - teacher)[..., others].square().sum() / teacher[..., others].square().sum())
    # Measured: 0.359 and 0.941.
    assert errors[10.0] < 0.6 * errors[None]


def test_what_is_reported_is_what_is_stored(ok, run, tmp_path, monkeypatch):
    """The stored tensors of the best epoch, decoded, give that epoch's held-out error to the last bit."""
    real, again = TrainingLoop.run, []

    def check(self):
        best = real(self)
        block = self.objective.student.block
        for name in block.linears:
            linear = block.linear(name)
            linear.weight.data.copy_(PackedWeight.from_tensors(best, block.prefix + name, linear.in_features).values())
        again.append(self.objective.held_out(self.order.held, self.progress))
        return best

    monkeypatch.setattr(TrainingLoop, "run", check)
    ok("distill", "--recipe", run(), MORE)
    for record, held in zip(events(tmp_path / "run" / "distill"), again, strict=True):
        assert record["after"] == held
        assert record["after"] == record["epochs"][record["best_epoch"] - 1]["held_out"]


def test_the_start_keeps_the_advantage_of_compensated_codes(parent):
    """Latents equal to the source weights would throw it away: their first step begins above the ptq error."""
    from lbllm_cli.format.levels import level_values
    from lbllm_cli.format.weights import grouped, ranks_from_codes, unpack_codes
    from lbllm_cli.training.ste import nearest_ranks

    toy, output = parent
    weights = load_file(toy / "model.safetensors")
    stored = Checkpoint(output, "ptq").read_block(1)
    moved = total = 0
    for prefix in PackedWeight.owners(stored):
        weight = weights[f"{prefix}.weight"]
        codes = unpack_codes(stored[f"{prefix}.weight"], weight.shape[1])
        ranks, levels = ranks_from_codes(codes, level_values(stored[f"{prefix}.levels"], stored[f"{prefix}.scale"]))
        naive = nearest_ranks(grouped(weight, 32), levels).flatten(1)[:, : weight.shape[1]]
        moved += int((naive != ranks).sum())
        total += ranks.numel()
    assert moved / total > 0.1  # measured 0.196: these codes a naive start would undo


@pytest.mark.parametrize("streams", ["ram", "disk"])
def test_interrupted_between_any_two_steps_and_resumed_equals_uninterrupted(ok, lbllm, run, tmp_path, monkeypatch, streams):
    command = ("distill", "--recipe", run(batch_size=3, micro_batch_size=2, ema_decay=0.9), f"runtime.streams={streams}")
    folder = tmp_path / "run" / "distill"
    ok(*command)
    expected = promised(folder)
    shutil.rmtree(folder)
    assert run_in_pieces(lbllm, monkeypatch, folder, *command) >= 6  # 3 blocks x 2 epochs x 3 steps
    assert promised(folder) == expected
    assert not list((tmp_path / "run" / "distill").rglob("*.bin"))
    assert not (tmp_path / "run" / "distill" / "training.safetensors").exists()


def test_what_a_kill_leaves_of_a_file_that_is_being_written_is_no_obstacle(ok, lbllm, run, tmp_path, monkeypatch):
    """safetensors writes under a name of its own first; a process that is killed then leaves it there."""
    command, partial = ("distill", "--recipe", run(epochs=1)), tmp_path / "run" / "distill.partial"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "run", killed)
        assert lbllm(*command).exit_code == 130
    left, own = partial / ".tmpaB3xY9", partial / ".tmpfile"
    left.write_bytes(b"half")
    own.write_bytes(b"the user's")
    assert "holds .tmpfile" in lbllm(*command).stderr
    own.unlink()
    ok(*command)
    assert not list((tmp_path / "run").rglob(left.name))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parametrisation", "train", "rate"), [("nearest", ["levels"], 0.1), ("bitmap", ["levels", "bitmap"], 0.01)]
)
def test_a_run_with_frozen_latents_is_resumed(ok, lbllm, run, tmp_path, monkeypatch, parametrisation, train, rate):
    settings = {"parametrisation": parametrisation, "train": train, "lr_levels": rate, "epochs": 1}
    command, folder = ("distill", "--recipe", run(**settings), MORE), tmp_path / "run" / "distill"
    ok(*command)
    expected = promised(folder)
    shutil.rmtree(folder)
    assert run_in_pieces(lbllm, monkeypatch, folder, *command, calls=60)
    assert promised(folder) == expected


@pytest.mark.slow
def test_a_linear_of_zeros_stays_one(ok, tmp_path, toy):
    """Models that were expanded by blocks that do nothing have them, and norms of zeros."""
    folder = tmp_path / "model"
    shutil.copytree(toy, folder)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    for name in ("mlp.down_proj.weight", "input_layernorm.weight"):
        tensors[f"model.layers.1.{name}"].zero_()
    save_file(tensors, file, metadata={"format": "pt"})
    phase = {"end_to_end": {"sequences": 4, "epochs": 1}}
    for level_bits in (8, 2):
        run, levels = tmp_path / f"run{level_bits}", {"level_bits": level_bits}
        recipe = write_recipe(tmp_path / "r.yaml", folder, run, ptq=levels, distill=phase, act_calib=phase)
        for command in ("ptq", "distill", "act-calib"):
            ok(command, "--recipe", recipe)
        name = "model.layers.1.mlp.down_proj"
        packed = PackedWeight.from_tensors(load_file(run / "act-calib-e2e" / BLOCKS[1]), name, tensors[f"{name}.weight"].shape[1])
        assert not packed.values().any()


def test_streams_micro_batches_of_one_step_and_disk_agree(ok, run, tmp_path):
    ok("distill", "--recipe", run(), "runtime.streams=disk")
    on_disk = block_bytes(tmp_path / "run" / "distill")
    ok("distill", "--recipe", run(), "runtime.streams=ram", "--force")
    assert block_bytes(tmp_path / "run" / "distill") == on_disk


def test_micro_batches_add_up_to_the_batch(run, parent, monkeypatch, ok, tmp_path):
    """Gradients of one step of 4 sequences, whole and in four pieces: equal but for rounding."""
    seen, key = {}, 0
    real = torch.optim.AdamW.step

    def look(self, *arguments):
        seen.setdefault(key, [p.grad.clone() for group in self.param_groups for p in group["params"]])
        return real(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", look)
    for size in (4, 1):
        key = size
        ok("distill", "--recipe", run(batch_size=4, micro_batch_size=size), "--force")
    for whole, pieces in zip(seen[4], seen[1], strict=True):
        torch.testing.assert_close(whole, pieces, rtol=1e-4, atol=1e-6)


def test_records_of_an_epoch(ok, run, tmp_path):
    ok("distill", "--recipe", run(parametrisation="bitmap", lr_bitmap=0.2))
    for record in events(tmp_path / "run" / "distill"):
        assert len(record["epochs"]) == 2
        for epoch in record["epochs"]:
            assert {"loss", "held_out_loss", "held_out", "flipped_signs", "flipped_bits", "polarisation"} <= set(epoch)
            assert {"lr", "gradient_norm", "tokens_per_second", "peak_ram_bytes", "skipped"} <= set(epoch)
            assert set(epoch["lr"]) == {"weights", "levels", "bitmap"}
            assert 0 < epoch["polarisation"] <= 1
            assert epoch["tokens_per_second"] > 0
        assert record["epochs"][0]["flipped_bits"] > 0


def test_plot_is_a_picture(ok, run, tmp_path):
    ok("distill", "--recipe", run())
    assert (tmp_path / "run" / "distill" / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("train", [["levels"], ["weights"]])
def test_only_what_is_named_is_trained(ok, run, tmp_path, train):
    ok("distill", "--recipe", run(train=train), MORE)
    before, after = (load_file(tmp_path / "run" / stage / BLOCKS[1]) for stage in ("ptq", "distill"))
    changed = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    if train == ["levels"]:
        assert changed == {"levels", "scale"}
    else:
        assert changed == {"weight"}


def test_steps_that_are_not_finite_are_skipped_and_counted(ok, lbllm, run, tmp_path, monkeypatch):
    real, calls = BlockObjective.loss, []

    def sometimes(self, piece, start):
        calls.append(1)
        return real(self, piece, start) * (float("nan") if len(calls) % 3 == 0 else 1)

    monkeypatch.setattr(BlockObjective, "loss", sometimes)
    ok("distill", "--recipe", run())
    record = events(tmp_path / "run" / "distill")[0]
    assert record["skipped"] == 2  # 8 steps of one micro-batch each: the third and the sixth
    calls.clear()
    result = lbllm("distill", "--recipe", run(max_skipped=1), "--force")
    assert result.exit_code == 1
    assert "block 0, epoch 2, step 2: loss nan" in result.stderr
    assert "distill.max_skipped allows 1" in result.stderr


def test_state_is_saved_when_time_has_passed(tmp_path):
    assert TrainingState(tmp_path, minutes=0).due()
    assert not TrainingState(tmp_path, minutes=1).due()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("distill.epochs=-1", "distill.epochs: input should be greater than or equal to 0"),
        ("distill.lr_weights=0", "distill.lr_weights: input should be greater than 0"),
        ("distill.lr_bitmap=2", "distill.lr_bitmap: input should be less than or equal to 1"),
        ("distill.train=[bitmap]", "parametrisation `nearest` has no bitmap"),
        ("distill.batch_size=9", "9 sequences leave 8 beside those that distill.held_out takes"),
        ("data.training.sequences=1", "data.training.sequences: one is held out"),
        ("distill.parametrisation=nearest_level", "distill.parametrisation"),
        ("data.training.sequences=90000", "2,880,000 are needed (90000 sequences x 32)"),
        ("data.training.length=4096", "data.training.length is 4096, the model has 128 positions"),
    ],
)
def test_budgets_and_rates(lbllm, run, tmp_path, override, expected):
    assert expected in refused(lbllm, tmp_path / "run", "distill", "--recipe", run(), override)


def test_parents(lbllm, ok, run, parent, tmp_path):
    recipe = run()
    folder = tmp_path / "run"
    message = refused(lbllm, folder, "distill", "--recipe", recipe, "ptq.group_size=64")
    assert "ptq.group_size: 32 -> 64" in message
    assert "lbllm ptq --recipe" in message
    message = refused(lbllm, folder, "distill", "--recipe", recipe, "data.calibration.sequences=5")
    assert "data.calibration.sequences: 6 -> 5" in message
    other = save_toy(tmp_path / "other", intermediate_size=128)
    assert "was made from another model" in refused(lbllm, folder, "distill", "--recipe", recipe, f"model.path={other}")
    (folder / "ptq" / "lbllm_stage.json").unlink()
    assert "lbllm ptq --recipe" in refused(lbllm, folder, "distill", "--recipe", recipe)


def test_another_parent_makes_the_stage_out_of_date(ok, lbllm, run, tmp_path):
    recipe = run()
    ok("distill", "--recipe", recipe)
    assert "up to date" in ok("distill", "--recipe", recipe).stderr
    ok("ptq", "--recipe", recipe, "ptq.rounds=0", "--force")
    result = lbllm("distill", "--recipe", recipe, "ptq.rounds=0")
    assert result.exit_code == 2
    assert "parent.files" in result.stderr
    for command in ("eval", "export"):
        message = refused(lbllm, tmp_path / "run", command, "--recipe", recipe)
        assert "was made from another ptq checkpoint" in message
        assert "lbllm distill --recipe ... --force" in message


def test_disk_too_small_for_the_streams(lbllm, run, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10, 9, 60_000))
    message = refused(lbllm, tmp_path / "run", "distill", "--recipe", run(), "runtime.streams=disk")
    assert "distill needs 0.00 GiB of disk" in message


def test_a_disk_that_the_stage_itself_has_filled_is_large_enough(lbllm, ok, run, tmp_path, monkeypatch):
    """What an interrupted or finished stage has written is not asked for once more."""
    output, usage, capacity = tmp_path / "run", namedtuple("usage", "total used free"), [10**9]

    def filled(folder):
        used = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
        return usage(capacity[0], used, capacity[0] - used)

    monkeypatch.setattr(shutil, "disk_usage", filled)
    recipe = run(batch_size=3)
    command = ("distill", "--recipe", recipe, "runtime.streams=disk")
    need = json.loads(ok("validate", "--recipe", recipe, "runtime.streams=disk", "--json").stdout)["forecast_bytes"]["distill"]
    capacity[0] = int(sum(file.stat().st_size for file in output.rglob("*")) + 1.02 * need["disk"])
    stopped = run_in_pieces(lbllm, monkeypatch, output / "distill", *command)
    assert stopped
    # Less is free now than a stage that begins would need.
    assert filled(output).free < need["disk"]
    assert "up to date" in ok(*command).stderr
    ok("validate", "--recipe", recipe, "runtime.streams=disk")
    assert "GiB of disk" in refused(lbllm, output, *command, "--force")


def test_full_disk_in_the_middle_of_a_block_is_resumable(lbllm, ok, run, tmp_path, monkeypatch):
    from lbllm_cli.pipeline import training_state

    recipe = run()
    ok("distill", "--recipe", recipe)
    expected = block_bytes(tmp_path / "run" / "distill")
    real, calls = training_state.save_file, []

    def full(*arguments, **options):
        calls.append(1)
        if len(calls) == 7:
            raise OSError(28, "No space left on device", "training.safetensors")
        real(*arguments, **options)

    monkeypatch.setattr(training_state, "save_file", full)
    result = lbllm("distill", "--recipe", recipe, "runtime.save_minutes=0", "--force")
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr
    # The state of the step before is whole, and the run goes on from it.
    assert TrainingState(tmp_path / "run" / "distill.partial", 1).load(0) is not None
    ok("distill", "--recipe", recipe)
    assert block_bytes(tmp_path / "run" / "distill") == expected


def test_eval_and_export_know_the_stage(ok, run, tmp_path):
    recipe = run()
    ok("distill", "--recipe", recipe, MORE)
    results = json.loads(ok("eval", "--recipe", recipe, "--json").stdout)
    assert list(results) == ["base", "ptq", "distill"]
    assert results["distill"]["bytes"] == results["ptq"]["bytes"]
    assert results["distill"]["perplexity"] != results["ptq"]["perplexity"]
    ok("export", "--recipe", recipe)
    exported = load_file(tmp_path / "run" / "export" / "model.safetensors")
    stored = load_file(tmp_path / "run" / "distill" / BLOCKS[0])
    assert all(torch.equal(exported[name], tensor) for name, tensor in stored.items())


def test_an_interrupt_is_only_noticed_between_steps(monkeypatch, ok, run):
    """A signal during a step leaves no half-applied step behind: the step ends before the state is written."""
    order = []
    monkeypatch.setattr(training.interrupt, "check", lambda: order.append("check"))
    real = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (order.append("update"), real(self)))
    ok("distill", "--recipe", run())
    first = order.index("update")
    assert order[first - 1] == "check"
    assert Interrupted.exit_code == 130
