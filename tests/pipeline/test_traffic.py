"""What ranks hand over, out of shapes: the bytes that they count while they run."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, save_toy, write_recipe

from lbllm_cli.parallel.shares import padded
from lbllm_cli.pipeline.duration import Part
from lbllm_cli.pipeline.plan import Plan, prepare
from lbllm_cli.pipeline.traffic import (
    AGREEMENT,
    ALL_REDUCE,
    BACKWARD,
    BROADCAST,
    GATHER,
    OWNERS,
    REDUCE,
    Call,
    Exchanged,
    packed_sizes,
    sample_call,
    stage_seconds,
)
from lbllm_cli.pipeline.work import work_of
from lbllm_cli.pipeline.world import World
from lbllm_cli.ptq.traffic import ptq_calls
from lbllm_cli.recipe.load import load_recipe
from lbllm_cli.recipe.schema import Ptq
from lbllm_cli.recipe.stages import STAGES
from lbllm_cli.runtime.cards import CARDS
from lbllm_cli.runtime.links import FAST, NVLINK, Link
from lbllm_cli.training.traffic import copied_bytes, gathered_bytes

TWO = World(2, 2)
# Of the trained toy, a block: seven linears of 184,320 weights, float32.
WEIGHTS = 4 * 184_320


def ranks(world: World, command: str, recipe: Path, *changes: str) -> None:
    """Runs a stage in some processes, of which `world.node` are said to share a machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": str(world.size), "LOCAL_WORLD_SIZE": str(world.node), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    line = [sys.executable, "-m", "lbllm_cli", command, "--recipe", str(recipe), *changes]
    processes = [
        subprocess.Popen(
            line, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank % world.node), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(world.size)
    ]  # fmt: skip
    ended = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * world.size, ended[0][1]


def planned(world: World, recipe: Path, *changes: str) -> Plan:
    """A plan of one process for some ranks."""
    return prepare(load_recipe(recipe, list(changes)), asked=world)


def records(folder: Path) -> list[dict[str, Any]]:
    """Of blocks, or of the steps of a phase."""
    lines = map(json.loads, (folder / "events.jsonl").read_text(encoding="utf-8").splitlines())
    return [record for record in lines if "ranks" in record]


def better(epochs: list[dict[str, Any]], start: dict[str, Any]) -> int:
    """Epochs whose weights were kept."""
    best, found = 1.0, 0
    for epoch in epochs:
        if epoch["held_out_loss"] < best and epoch["held_out"].get("error_ordinary", 0) <= start.get("error_ordinary", 0):
            best, found = epoch["held_out_loss"], found + 1
    return found


def forecast(exchanged: Exchanged, kept: int) -> dict[str, int]:
    """Bytes by kind of a block in which so many epochs were better than all before."""
    found: dict[str, int] = {}
    for call in exchanged.calls:
        times = kept if "better epoch" in call.what else call.times
        found[call.kind] = found.get(call.kind, 0) + call.size * times
    return {kind: size for kind, size in found.items() if size}


def counted(record: dict[str, Any]) -> list[dict[str, int]]:
    """Bytes by kind of each rank."""
    return [{kind: size for kind, size in one["bytes"].items() if size} for one in record["ranks"]]


def check(plan: Plan, stage: str) -> None:
    """Compares every block of a stage that has run."""
    exchanged = work_of(STAGES[stage]).exchanged(plan, STAGES[stage])
    found = records(plan.output / stage)
    assert len(found) == exchanged.blocks == plan.model.blocks
    for record in found:
        wanted = forecast(exchanged, better(record.get("epochs", []), record.get("before", {})))
        each = counted(record)
        # Only what owners say to those of other machines differs between ranks.
        most = {kind: max(one.get(kind, 0) for one in each) for kind in wanted}
        assert most == wanted
        assert all({**one, OWNERS: 0} == {**each[0], OWNERS: 0} for one in each)


@pytest.mark.slow
def test_bytes_of_two_ranks_are_those_that_they_count(tmp_path):
    recipe = ROOT / "recipes" / "toy.yaml"
    changes = (f"output.dir={tmp_path / 'run'}", "data.training.sequences=21", "data.calibration.sequences=9")
    plan = planned(TWO, recipe, *changes)
    # Two processes of a stage are ten seconds of imports: quantizers are among the recipes below.
    for stage in ("ptq", "distill"):
        ranks(TWO, stage, recipe, *changes)
        check(plan, stage)


VARIANTS = {
    "all units at once": ("ptq", TWO, ("ptq.sequential=false", "ptq.asymmetric=0.5", "ptq.level_bits=4")),
    "a scale for each row": ("ptq", TWO, ("ptq.level_bits=2", "ptq.group_size=16")),
    "owners on two machines": ("distill", World(4, 2), ("distill.parametrisation=bitmap", "distill.channel_cap=10")),
    "a rank on each machine": ("distill", World(2, 1), ("distill.epochs=1",)),
    "levels alone": ("distill", TWO, ("distill.parametrisation=bitmap", "distill.train=[levels]")),
    "quantizers alone": ("act-calib", TWO, ("act_calib.parent=ptq",)),
    "codes beside quantizers": ("act-calib", World(4, 2), (
        "act_calib.parent=ptq", "act_calib.train=[weights,levels,clip_factors,knees]", "act_calib.kv_form=uniform",
        "act_calib.tables=1",
    )),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", [*VARIANTS, "experts"])
def test_bytes_of_other_recipes(tmp_path, name):
    command, world, changes = VARIANTS.get(name, ("ptq", TWO, ()))
    model = save_toy(tmp_path / "model", "qwen3-moe" if name == "experts" else "llama-tied")
    recipe = write_recipe(tmp_path / "r.yaml", model, tmp_path / "run", **{
        "data": {"training": {"source": str(tmp_path / "chapter.txt"), "sequences": 11, "length": 32}},
        "distill": {"batch_size": 4}, "act_calib": {"batch_size": 4},
    })  # fmt: skip
    plan = planned(world, recipe, *changes)
    if command != "ptq":
        ranks(World(2, 2), "ptq", recipe, *changes)
    ranks(world, command, recipe, *changes)
    check(plan, command)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("train", "bits"), [(["weights", "levels", "norms"], 8), (["levels", "norms"], 8), (["scales"], 8), (["scales"], 2)]
)
def test_bytes_of_a_phase(tmp_path, train, bits):
    phase = {"sequences": 9, "batch_size": 4, "train": train}
    recipe = write_recipe(
        tmp_path / "r.yaml", save_toy(tmp_path / "model"), tmp_path / "run",
        ptq={"level_bits": bits}, distill={"batch_size": 4, "epochs": 1, "end_to_end": phase},
    )  # fmt: skip
    for command in ("ptq", "distill"):
        ranks(TWO, command, recipe)
    plan = planned(TWO, recipe)
    exchanged = work_of(STAGES["distill-e2e"]).exchanged(plan, STAGES["distill-e2e"])
    lines = (plan.output / "distill-e2e" / "events.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [counted(json.loads(line)) for line in lines if "ranks" in json.loads(line)]
    assert len(steps) == exchanged.steps == 2
    # What is measured after the last step has no record.
    wanted = exchanged.per_step()
    assert steps[1][0] == wanted
    before = {call.kind: call.size for call in exchanged.calls if call.what == "weights that are measured"}
    assert steps[0][0] == {kind: size + before.get(kind, 0) for kind, size in wanted.items()}


def test_centres_of_keys_are_among_what_a_better_epoch_leaves(tmp_path):
    recipe = ROOT / "recipes" / "toy.yaml"
    phase = "act_calib.end_to_end={sequences: 16, train: [weights, levels, norms]}"
    sizes = []
    for centre in ("none", "mean"):
        plan = planned(TWO, recipe, f"output.dir={tmp_path / 'run'}", phase, f"act_calib.key_centre={centre}")
        calls = work_of(STAGES["act-calib-e2e"]).exchanged(plan, STAGES["act-calib-e2e"]).calls
        sizes.append(next(call.size for call in calls if "better epoch" in call.what))
    # A number of 32 bits for each channel of the keys, in each of four blocks.
    assert sizes[1] - sizes[0] == plan.model.blocks * padded(4 * plan.model.kv_width)


def test_a_step_by_hand(tmp_path):
    recipe = ROOT / "recipes" / "toy.yaml"
    changes = (f"output.dir={tmp_path / 'run'}", "data.training.sequences=32")
    one, two = (planned(World(4, node), recipe, *changes) for node in (4, 2))
    found = work_of(STAGES["distill"]).exchanged(one, STAGES["distill"])
    # 30 sequences, two in a step, two epochs; weights are spread before the first and after each epoch as well.
    assert (found.steps, found.blocks, found.micro) == (30, 4, 1)
    assert found.per_step() == {REDUCE: WEIGHTS, BROADCAST: WEIGHTS, ALL_REDUCE: 8}
    assert found.per_block()[BROADCAST] == 33 * WEIGHTS
    # gate and down 90,112 weights; up, q, k, o and v 94,208: of two owners the latter has more.
    across = work_of(STAGES["distill"]).exchanged(two, STAGES["distill"])
    assert across.per_step() == {**found.per_step(), OWNERS: 4 * 94_208}
    act = work_of(STAGES["act-calib"]).exchanged(one, STAGES["act-calib"])
    # 11,776 levels, six quantizers of eight numbers, loss and norm.
    assert act.per_step() == {ALL_REDUCE: 4 * (11_776 + 48 + 2)}
    # Eight sequences of 256 x 128 that are spread over four ranks.
    assert act.per_block()[GATHER] == 2 * 256 * 128 * 4


def test_moments_by_hand():
    both = {("q", "k"): [(64, 64), (64, 64)], ("o",): [(64, 96)]}
    calls = ptq_calls(both, [(("q", "k"), ("o",))], Ptq(group_size=32, sequential=False), 2)
    # Fitted and held-out, H and drift; then two sums of each linear, twice. Two units of two ranks: one each.
    assert {call.kind for call in calls} == {REDUCE, GATHER}
    assert sum(call.size * call.times for call in calls if call.kind == REDUCE) == 4 * 4 * (64**2 + 96**2)
    (gather,) = (call for call in calls if call.kind == GATHER)
    assert gather.size == 2 * sum(packed_sizes((64, 64), Ptq(group_size=32)))
    rows = ptq_calls(both, [(("q", "k"),), (("o",),)], Ptq(group_size=32, asymmetric=0), 2)
    assert sum(call.size * call.times for call in rows if call.kind == ALL_REDUCE) == 4 * (64**2 + 96**2) + 8 * 3


def test_parts_that_traffic_is_made_of():
    assert packed_sizes((128, 352), Ptq(group_size=64)) == [12_288, 3_072, 1_536]
    assert packed_sizes((128, 352), Ptq(group_size=64, level_bits=4)) == [12_288, 1_536, 1_536]
    assert packed_sizes((128, 352), Ptq(group_size=16, level_bits=2)) == [11_264, 2_816, 256]
    assert copied_bytes([4, 4, 128]) == 4 * 136
    # 16 + 4 (padded to 16) + 2 (to 16) beside a tensor of 5 that all have; the other rank has two such linears.
    shapes = {"a": (1, 64), "b": (1, 64), "c": (1, 64)}
    assert gathered_bytes(shapes, {"a": 0, "b": 1, "c": 1}, Ptq(group_size=64), [5]) == 2 * 48 + 16
    # 0, 3, 5, 8 of ten: two of each half; three halves of a float32 row of 6 begin at multiples of 16.
    assert sample_call("", TWO, 10, 4, 24).size == 48


def test_seconds_of_calls_on_links():
    link = Link("", 1e9, 0.0, 1.0)
    world = World(16, 8)
    add = Call("", ALL_REDUCE, 8_000_000, 1)
    assert add.inside(world, link) == pytest.approx(2 * 7 / 8 * 8e-3)
    assert add.between(world, link) == pytest.approx(8e-3)
    assert Call("", BROADCAST, 1_000_000, 1, node=True).between(world, link) == 0
    assert Call("", GATHER, 1_000_000, 1).between(world, link) == pytest.approx(8e-3)
    owners = Call("", OWNERS, 1_000_000, 1, together=8_000_000)
    assert (owners.inside(world, link), owners.between(world, link)) == (0, pytest.approx(8e-3))
    cards = replace(link, cards=8)
    assert add.between(world, cards) == pytest.approx(1e-3)
    assert replace(owners, size=3_000_000).between(world, cards) == pytest.approx(3e-3)
    assert add.inside(World(2, 1), link) == add.between(World(2, 2), link) == 0


def test_a_reduction_hides_behind_the_way_back():
    calls = (Call("", REDUCE, 80_000_000, 10, step=True, node=True, beside=BACKWARD),)
    link = Link("", 1e9, 0.0, 1.0)
    exchanged = Exchanged(calls, 2, steps=10, micro=2)
    # 80 ms each; of a step's 60 ms a third is the last micro-batch's way back.
    assert exchanged.waits(TWO, (link, FAST), 1.2) == {REDUCE: pytest.approx(20 * 0.06)}
    assert exchanged.waits(TWO, (link, FAST), 12.0) == {}
    # What hosts say takes 50 us each time; it is waited for where the device has nothing to do meanwhile.
    talking = Exchanged((), 2, steps=10, said=1000)
    assert talking.waits(TWO, (link, FAST), 0.04) == {AGREEMENT: pytest.approx(0.06)}
    assert talking.waits(TWO, (link, FAST), 0.2) == {}
    assert Exchanged((), 2, said=1000).waits(TWO, (link, FAST), 0.0) == {AGREEMENT: pytest.approx(0.1)}
    parts = [Part("steps", "", products=1e15), Part("passes", "", products=1e14)]
    alone, both = (stage_seconds(parts, exchanged, world, CARDS["h100"], "device", (NVLINK, FAST)) for world in (World(), TWO))
    assert set(alone) == {"steps", "passes"}
    assert both == alone


def test_a_world_of_ranks():
    assert World.asked(16, None) == World(16, 8)
    assert World.asked(3, None) == World(3, 3)
    assert (World(16, 8).machines, World(16, 8).most(33), World().several) == (2, 3, False)
    assert str(World(16, 8)) == "16 ranks on 2 machines"
