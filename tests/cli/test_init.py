"""`lbllm init`: recipes for models of true sizes on machines that are not this one, and what it refuses."""

import json
import os
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from cli.machines import GIB, MACHINES, pretend
from conftest import ASSETS, TOY

from lbllm_cli.cli import draft as drafts
from lbllm_cli.cli import machine as machines
from lbllm_cli.cli.draft import SHARES, draft, lower
from lbllm_cli.cli.draft_text import CHAT, OWN, WEB, Settings, default_name, recipe_text
from lbllm_cli.cli.machine import Machine, PlacedModel
from lbllm_cli.core.errors import UsageError
from lbllm_cli.core.strict_yaml import parse_yaml
from lbllm_cli.models.families import FAMILIES
from lbllm_cli.recipe.load import load_recipe
from lbllm_cli.recipe.schema import Recipe
from lbllm_cli.recipe.shipped import MODELINE

CONFIGS = ASSETS / "configs"
# A mixture of experts has so many tensors that a forecast takes seconds.
NAMES = [
    pytest.param(path.name, marks=[pytest.mark.slow] if "A3B" in path.name else [], id=path.name)
    for path in sorted(CONFIGS.iterdir())
]
# What fits a machine with no settings, and a stage that says so.
TOO_LARGE = {
    ("Llama-3.1-70B", "gpu-24"): "ptq",
    ("Llama-3.1-70B", "laptop"): "ptq",
    ("Phi-4", "laptop"): "ptq",
    ("Qwen3-30B-A3B", "laptop"): "distill",
}


def config_of(name: str) -> Path:
    """The folder of a configuration. Skips where its family is not supported."""
    folder = CONFIGS / name
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = values.get("text_config", values)["model_type"]
    if kind not in FAMILIES:
        pytest.skip(f"{kind} is no family of this version")
    return folder


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", MACHINES)
def test_a_recipe_fits_the_machine_or_is_refused_by_stage(lbllm, tmp_path, monkeypatch, name, place):
    machine, folder = MACHINES[place], config_of(name)
    monkeypatch.chdir(tmp_path)
    pretend(monkeypatch, machine)
    result = lbllm("init", folder)
    file = tmp_path / default_name(name)
    if stage := TOO_LARGE.get((name, place)):
        assert result.exit_code == 2
        assert "does not fit this machine" in result.stderr
        assert f"\n  {stage} needs about " in result.stderr
        assert not list(tmp_path.iterdir())
        return
    assert result.exit_code == 0, result.stderr
    assert file.read_text(encoding="utf-8").startswith(MODELINE)
    recipe = load_recipe(file)
    validated = lbllm("validate", "--recipe", file, "--json")
    assert validated.exit_code == 0, validated.stderr
    found = json.loads(validated.stdout)
    assert found["device"] == machine.kind
    assert [line for line in found["warnings"] if "memory" in line or "RAM" in line] == []
    for stage, needed in found["forecast_bytes"].items():
        assert needed["ram"] <= SHARES["ram"] * machine.ram, stage
        assert not machine.has_gpu or needed["device"] <= SHARES["device"] * machine.memory, stage
        assert needed["disk"] + needed["teacher"] <= machine.disk, stage
    assert f"lbllm act-calib --recipe {file.name}" in result.stdout
    assert (recipe.ptq.group_size, recipe.ptq.level_bits, recipe.step_group) == (16, 2, 32)
    assert re.search(r"group_size: 16 +# 2\.5\d* bits per weight; 32: 2\.2\d+\n", file.read_text(encoding="utf-8"))
    assert recipe.model.dtype == ("bfloat16" if machine.has_gpu else "float32")
    assert (recipe.distill.channel_cap, recipe.act_calib.channel_cap) == ((10, 10) if "Gemma-3" in name else (None, None))


@pytest.mark.parametrize(("name", "place"), [("Llama-3.1-8B", "gpu-80"), ("SmolLM2-135M", "laptop"), ("Qwen3-8B", "laptop")])
def test_text_is_chosen_by_template_and_machine(name, place):
    for chat in (False, True):
        model = PlacedModel.open(str(config_of(name)), MACHINES[place])
        recipe = draft(model, "org/model", "model.yaml", chat).recipe
        wanted = {WEB: 2, OWN: 1, CHAT: 1} if chat else {WEB: 3, OWN: 1}
        if name == "Qwen3-8B":
            del wanted[OWN]  # a CPU samples for hours
        for text in (recipe.data.calibration, recipe.data.training):
            assert {item.source: item.weight for item in text.source} == wanted
        assert [item.name for item in recipe.data.evaluation] == ["wikitext2", "c4"]


def test_sequences_are_no_longer_than_the_model_knows(tmp_path):
    values = json.loads((CONFIGS / "SmolLM2-135M" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**values, "max_position_embeddings": 384}), encoding="utf-8")
    for machine in MACHINES.values():
        data = draft(PlacedModel.open(str(tmp_path), machine), "m", "m.yaml", chat=False).recipe.data
        assert {data.calibration.length, data.training.length, *(item.length for item in data.evaluation)} == {384}


def test_less_of_a_machine_gives_a_more_frugal_recipe_with_the_reason():
    """RAM is taken away until streams go to disk, then text that is sampled with the whole model in memory; then disk."""
    folder = str(config_of("Llama-3.1-8B"))
    found = {}
    for ram in (60, 38, 16):
        machine = Machine("cuda", "a card", 32 * GIB, ram * GIB, 500 * GIB, 8)
        found[ram] = draft(PlacedModel.open(folder, machine), "m", "m.yaml", chat=False)
    assert [one.recipe.runtime.streams for one in found.values()] == ["ram", "disk", "disk"]
    sampled = [any(item.sampled for item in one.recipe.data.training.source) for one in found.values()]
    assert sampled[0]
    assert not sampled[2]
    assert re.search(r"streams: disk +# with streams in RAM \S+ needs [\d.]+ GiB of RAM, 34\.2 may be used\n", found[38].text)
    assert f"# no {OWN} among them: where the model samples text ptq needs" in found[16].text
    disk = Machine("cuda", "a card", 32 * GIB, 38 * GIB, 60 * GIB, 8)
    small = draft(PlacedModel.open(folder, disk), "m", "m.yaml", chat=False)
    assert re.search(r"sequences: \d+ +# with \d+ \S+ needs [\d.]+ GiB of disk, 57\.0 may be used\n", small.text)


def test_a_shortage_that_one_stage_cannot_mend_does_not_hide_the_others(tmp_path):
    machine = Machine("cuda", "a card", 4 * GIB, 3 * GIB, 10 * GIB, 4)
    with pytest.raises(UsageError, match="does not fit this machine") as caught:
        draft(PlacedModel.open(str(config_of("Llama-3.1-8B")), machine), "m", "m.yaml", chat=False)
    lines = str(caught.value).splitlines()
    assert any("GiB of device memory" in line for line in lines)
    assert any("GiB of disk" in line for line in lines)


def test_values_below_a_setting_come_nearest_first():
    settings = Settings("m", "m", "float32", 2048, 2048, {WEB: 1})
    assert list(lower(settings, "streams")) == ["ram", "disk"]
    assert list(lower(settings, "batch")) == [2, 1]
    assert list(lower(settings, "phases")) == [256, 128, 64, 0]
    assert list(lower(settings, "own_text")) == [False]
    assert list(lower(settings, "length"))[-1] == 128


@pytest.mark.parametrize("path", ["a b/c: d #1", "12e4567", "on", "./x", "~/models/é", 'quo"te'])
def test_paths_are_written_so_that_they_are_read_as_they_are(path):
    settings = Settings(path, "name", "float32", 512, 512, {WEB: 1, OWN: 1})
    assert Recipe.model_validate(parse_yaml(recipe_text(settings, {}), "r")).model.path == path


def test_names_of_files(tmp_path, monkeypatch):
    assert default_name("meta-llama/Llama-3.1-8B") == "llama-3.1-8b.yaml"
    (tmp_path / "My Model (v2)").mkdir()
    monkeypatch.chdir(tmp_path / "My Model (v2)")
    assert default_name(".") == "my-model-v2.yaml"
    assert default_name("org/\u6a21\u578b") == "model.yaml"
    text = draft(PlacedModel.open(str(TOY), MACHINES["laptop"]), ".", "m.yaml", chat=False).text
    assert text.startswith("# My Model (v2), groups of 16: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], "MODEL is empty; give a model folder, or a Hugging Face id"),
        (["~nouser/x"], "MODEL ~nouser/x: there is no such user; write the path out"),
        (["a\0b"], "MODEL 'a\\x00b' is not a path: embedded null byte; give another"),
        (["a\udcff"], "MODEL a\\udcff is no Unicode text: character 1 is half a pair ('\\udcff')"),
        ([str(TOY), "-o", "~nouser/x.yaml"], "--output ~nouser/x.yaml: there is no such user; write the path out"),
    ],
)
def test_what_is_no_name_is_refused(lbllm, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = lbllm("init", *arguments)
    assert (result.exit_code, result.stderr) == (2, f"lbllm: {message}\n")
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_is_refused_before_the_model_is_opened(lbllm, tmp_path, monkeypatch):
    def opened(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(PlacedModel, "open", opened)
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    result = lbllm("init", TOY, "-o", "file/x.yaml")
    assert result.exit_code == 2
    said = "file/x.yaml cannot be written: file is no folder; move it away, or give another name with -o"
    assert result.stderr == f"lbllm: {said}\n"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    result = lbllm("init", TOY)
    assert result.exit_code == 2
    said = "toy.yaml cannot be written: . is not a writable folder; let this user write there, or give another name with -o"
    assert result.stderr == f"lbllm: {said}\n"


def test_what_the_system_refuses_is_not_called_a_run_to_resume(lbllm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.yaml.tmp").mkdir()
    result = lbllm("init", TOY, "-o", "x.yaml")
    assert result.exit_code == 2
    assert result.stderr == "lbllm: Is a directory (x.yaml.tmp); move away what is there and run the same command again\n"


@pytest.mark.parametrize(("place", "dtype"), [("laptop", "float32"), ("Zen 4", "bfloat16"), ("gpu-80", "bfloat16")])
def test_the_dtype_is_what_the_machine_trains_in_fastest_and_its_reason_is_true(ok, tmp_path, monkeypatch, place, dtype):
    machine = replace(MACHINES["laptop"], bfloat16=True) if place == "Zen 4" else MACHINES[place]
    pretend(monkeypatch, machine)
    ok("init", TOY, "-o", tmp_path / "r.yaml")
    (line,) = re.findall(r"^  dtype: .*$", (tmp_path / "r.yaml").read_text(encoding="utf-8"), flags=re.M)
    value, reason = re.fullmatch(r"  dtype: (\S+) +# (.+)", line).groups()
    assert value == load_recipe(tmp_path / "r.yaml").model.dtype == dtype
    assert reason == {
        "laptop": "bfloat16 trains faster on a CPU with avx512_bf16 or amx_bf16 in lscpu",
        "Zen 4": "trains faster with this CPU's instructions; `eval` with model.dtype=float32 measures in float32",
        "gpu-80": "float16 has no range for gradients",
    }[place]


def test_a_system_that_says_nothing_of_its_processors_has_no_instructions(monkeypatch):
    monkeypatch.setattr(machines, "_PROCESSORS", Path("/nowhere/cpuinfo"))
    assert not Machine.here().bfloat16


@pytest.mark.parametrize(
    ("folder", "place", "wanted"),
    [
        ("toy", "toy", "../toy-runs/toy"),
        ("toy", "toy/notes", "../../toy-runs/toy"),
        ("runs", ".", "runs-runs/toy"),
        ("runs/toy", ".", "runs/toy-runs/toy"),
        ("runs/toy/export", ".", "runs/toy/export-runs/toy"),
        ("models/toy", ".", "runs/toy"),
    ],
)
def test_a_run_does_not_lie_in_the_models_folder_or_around_it(ok, tmp_path, monkeypatch, little_text, folder, place, wanted):
    shutil.copytree(TOY, tmp_path / folder)
    (tmp_path / place).mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / place)
    path = os.path.relpath(tmp_path / folder)
    ok("init", path, "-o", "toy.yaml")
    assert load_recipe(Path("toy.yaml")).output.dir == wanted
    assert f"output.dir={wanted}-builtin\n" in Path("toy.yaml").read_text(encoding="utf-8")
    texts = [f"data.{name}.source=builtin:calibration" for name in ("calibration", "training")]
    texts.append('data.evaluation=[{name: novels, source: "builtin:evaluation/novels", length: 64, segments: 2}]')
    small = ["data.training.sequences=8", "distill.end_to_end=null", "act_calib.end_to_end=null"]
    ok("validate", "--recipe", "toy.yaml", *texts, *small)


def test_names_with_spaces_can_be_copied_from_the_commands(lbllm, ok, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TOY, "my model")
    target = "it's: mine.yaml"
    printed = ok("init", "my model", "-o", target).stdout
    header = [line.removeprefix("# ") for line in Path(target).read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
    assert "Written by `lbllm init 'my model'` for a machine with" in header
    commands = [line for line in printed.splitlines() if line.startswith("lbllm ")]
    assert len(commands) == 7
    assert all(shlex.split(line)[2:] == ["--recipe", target] for line in commands)
    (tries,) = [line.removeprefix("Try:") for line in header if line.startswith("Try:")]
    arguments = shlex.split(tries)
    overrides = arguments[arguments.index(target) + 1 :]
    assert load_recipe(Path(target), overrides).output.dir == "runs/it's: mine-builtin"


def test_a_name_of_two_lines_is_no_value_of_the_recipe(ok, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TOY, "a\nseed: 7")
    ok("init", "a\nseed: 7", "-o", "r.yaml")
    assert load_recipe(Path("r.yaml")).model.path == "a\nseed: 7"


def test_a_file_that_is_there_is_replaced_with_force_alone(lbllm, ok, tmp_path):
    target = tmp_path / "r.yaml"
    target.write_text("mine", encoding="utf-8")
    result = lbllm("init", TOY, "-o", target)
    assert result.exit_code == 2
    assert f"{target} is there already; give another name with -o, or --force" in result.stderr
    assert target.read_text(encoding="utf-8") == "mine"
    ok("init", TOY, "-o", target, "--force")
    assert load_recipe(target).model.path == str(TOY)
    for other, message in ((tmp_path, "is a folder; expected a file"), (tmp_path / "no" / "r.yaml", "there is no folder")):
        result = lbllm("init", TOY, "-o", other, "--force")
        assert result.exit_code == 2
        assert message in result.stderr


def test_the_schema_beside_a_recipe_is_named_before_the_installed_one(ok, tmp_path):
    ok("init", TOY, "-o", tmp_path / "a.yaml")
    assert (tmp_path / "a.yaml").read_text(encoding="utf-8").startswith(f"{MODELINE}file:///")
    (tmp_path / "recipe.schema.json").write_text(ok("config", "--schema").stdout, encoding="utf-8")
    ok("init", TOY, "-o", tmp_path / "b.yaml")
    assert (tmp_path / "b.yaml").read_text(encoding="utf-8").startswith(f"{MODELINE}recipe.schema.json\n")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported; supported: "),
        ({"num_hidden_layers": "many"}, "num_hidden_layers: expected a positive integer, got many"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": "x"}}, "config.json cannot be used: "),
        ({"hidden_act": "swishy"}, "config.json cannot be used: "),
    ],
)
def test_configurations_that_cannot_be_used_are_refused(lbllm, tmp_path, monkeypatch, changes, message):
    folder = tmp_path / "model"
    shutil.copytree(CONFIGS / "SmolLM2-135M", folder)
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**values, **changes}), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    result = lbllm("init", folder)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("lbllm: ") == 1
    assert not list(tmp_path.glob("*.yaml"))


def test_a_gated_model_says_how_to_get_it(lbllm, tmp_path, monkeypatch):
    from huggingface_hub.errors import GatedRepoError

    def refuse(*_: object, **options: object) -> str:
        assert "*.safetensors" not in options["allow_patterns"]
        raise GatedRepoError("gated", response=SimpleNamespace(headers={}, request=None, status_code=403))

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    monkeypatch.chdir(tmp_path)
    result = lbllm("init", "meta-llama/Llama-3.1-8B")
    assert result.exit_code == 2
    assert "meta-llama/Llama-3.1-8B is gated: accept its licence" in result.stderr
    assert not list(tmp_path.iterdir())


def test_nothing_is_allocated_for_a_large_model(monkeypatch):
    """Shapes alone: 70 billion parameters would need 131 GiB."""
    monkeypatch.setattr(drafts, "SHARES", {"device": 1.0, "ram": 1.0, "disk": 1.0})
    model = PlacedModel.open(str(config_of("Llama-3.1-70B")), MACHINES["gpu-80"])
    before = _resident()
    draft(model, "m", "m.yaml", chat=False)
    assert _resident() - before < GIB


def _resident() -> int:
    return 4096 * int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])


def test_a_recipe_on_standard_output_is_what_a_file_has(ok, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pretend(monkeypatch, MACHINES["laptop"])
    ok("init", TOY)
    printed = ok("init", TOY, "-o", "-").stdout
    assert printed == (tmp_path / "toy.yaml").read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["toy.yaml"]
