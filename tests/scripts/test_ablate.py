"""scripts/ablate.py: variants are recipes, share their parents, and cost nothing once they are finished."""

import json
import shutil
import sys
from importlib.util import module_from_spec, spec_from_file_location
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT, save_toy, write_recipe
from typer.testing import CliRunner

from lbllm_cli.cli.app import app
from lbllm_cli.recipe.load import dump_recipe, load_recipe

SPEC = spec_from_file_location("ablate", ROOT / "scripts" / "ablate.py")
ablate = module_from_spec(SPEC)
SPEC.loader.exec_module(ablate)


@pytest.mark.parametrize("stage", ablate.VARIANTS)
def test_every_variant_is_a_recipe_of_its_own(stage):
    variants = ablate.VARIANTS[stage]
    # No variant asks for this many sequences: it would be the default under another name.
    keys = {name: ["data.training.sequences=77", *variant] for name, variant in variants.items()}
    assert len({dump_recipe(load_recipe(ROOT / "recipes" / "toy.yaml", found)) for found in keys.values()}) == len(variants)


@pytest.fixture
def run(tmp_path, monkeypatch, little_text, given_tables):
    """run(*arguments): the script on a toy; the commands that it ran, each by its first words."""
    monkeypatch.setattr(sys, "argv", [])
    recipe = write_recipe(tmp_path / "r.yaml", save_toy(tmp_path / "model"), tmp_path / "run")

    def started(command, **_):
        result = CliRunner().invoke(app, command[3:], catch_exceptions=False)
        trained = "up to date" not in result.stderr and result.exit_code == 0
        commands.append(" ".join(word for word in command[3:6] if not word.startswith("--")) + (" ran" if trained else ""))
        return SimpleNamespace(returncode=result.exit_code)

    def script(*arguments):
        commands.clear()
        sizes = ("--length", "32", "--segments", "2")
        sys.argv = ["ablate.py", "--recipe", str(recipe), "--out", str(tmp_path / "out"), *sizes, *arguments]
        ablate.main()
        return list(commands)

    commands: list[str] = []
    monkeypatch.setattr(ablate, "subprocess", SimpleNamespace(run=started, DEVNULL=None))
    return script


@pytest.mark.slow
def test_variants_of_a_last_phase_start_from_one_parent(run, tmp_path):
    command = ("--stage", "distill-e2e", "--only", "default", "norms", "distill.end_to_end.sequences=16", "distill.epochs=1")
    first = run(*command)
    assert [step for step in first if step.startswith(("ptq", "distill"))] == [
        f"ptq {tmp_path / 'r.yaml'} ran",
        "distill blocks ran",
        "distill end-to-end ran",
        "distill end-to-end ran",
    ]
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert list(table) == ["full precision", "default", "norms"]
    assert table["norms"]["tokens"] == table["default"]["tokens"] == 16 * 32
    assert table["default"]["perplexity"] != table["norms"]["perplexity"]
    assert run(*command) == ["distill end-to-end"] * 2
    assert json.loads((tmp_path / "out" / "table.json").read_text()) == table


def test_a_table_holds_one_kind_of_variants(run):
    run("--only", "default")
    with pytest.raises(SystemExit, match="choose another --out"):
        run("--only", "default", "ptq.damping=0.1")
    with pytest.raises(SystemExit):
        run("--only", "defualt")


def test_a_phase_that_the_recipe_itself_has_is_a_parent(run, tmp_path):
    recipe = tmp_path / "r.yaml"
    values = yaml.safe_load(recipe.read_text())
    values["distill"] = {"epochs": 0, "end_to_end": {"sequences": 16, "epochs": 0, "teacher": str(tmp_path / "teacher")}}
    recipe.write_text(yaml.safe_dump(values))
    found = run("--stage", "act-calib", "--only", "nothing trained")
    assert [step.removesuffix(" ran") for step in found if "eval" not in step] == [
        f"ptq {recipe}",
        "distill blocks",
        "distill end-to-end",
        "act-calib blocks",
    ]
    assert all(step.endswith(" ran") for step in found)


@pytest.mark.slow
def test_variants_with_other_text_have_their_own_teacher_s_states(run, tmp_path):
    teacher = f"distill.end_to_end.teacher={tmp_path / 'teacher'}"
    sizes = ("distill.end_to_end.sequences=16", "distill.epochs=0", "distill.end_to_end.epochs=0")
    run("--stage", "distill-e2e", "--only", "default", "32 sequences", teacher, *sizes)
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [table[name]["tokens"] for name in ("default", "32 sequences")] == [16 * 32, 32 * 32]


def test_texts_begin_as_the_recipes_do(run, tmp_path):
    def sets() -> list[dict]:
        (key,) = json.loads((tmp_path / "out" / "settings.json").read_text())["common"][:1]
        return json.loads(key.removeprefix("data.evaluation="))

    run("--only", "no refinement")
    assert not any("bos" in item for item in sets())
    shutil.rmtree(tmp_path / "out")
    run("--only", "no refinement", "data.calibration.bos=true")
    assert [item["bos"] for item in sets()] == [True] * 3
