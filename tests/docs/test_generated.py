"""Pages and drawings that scripts write are what the code says, and the check finds one that is not."""

import importlib.util
import sys
from types import ModuleType
from xml.etree import ElementTree

import pytest
import yaml
from conftest import ROOT

from lbllm_cli.recipe.schema import Recipe
from lbllm_cli.recipe.stages import TABLE


def module_of(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_stale_reference_is_found_and_written_anew(tmp_path, monkeypatch, capsys):
    module = module_of("recipe_reference")
    page, schema = tmp_path / "recipe.md", tmp_path / "recipe.schema.json"
    monkeypatch.setattr(module, "PAGE", page)
    monkeypatch.setattr(module, "SCHEMA_FILE", schema)
    monkeypatch.setattr(sys, "argv", ["recipe_reference.py", "--check"])
    assert module.main() == 1
    page.write_text(module.page().replace("`128`", "`64`", 1), encoding="utf-8")
    assert module.main() == 1
    assert "python scripts/recipe_reference.py" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["recipe_reference.py"])
    assert module.main() == 0
    monkeypatch.setattr(sys, "argv", ["recipe_reference.py", "--check"])
    assert module.main() == 0
    schema.write_text(schema.read_text(encoding="utf-8").replace('"act-calib-e2e"', '"act-calib-end"', 1), encoding="utf-8")
    assert module.main() == 1
    assert capsys.readouterr().err.startswith("recipe.schema.json is not what the schema says")


def test_a_stale_recipe_is_found(tmp_path, monkeypatch, capsys):
    module = module_of("draft_recipes")
    monkeypatch.setattr(module, "RECIPES", tmp_path)
    monkeypatch.setattr(module, "KEPT", module.KEPT[:1])
    monkeypatch.setattr(sys, "argv", ["draft_recipes.py"])
    assert module.main() == 0
    monkeypatch.setattr(sys, "argv", ["draft_recipes.py", "--check"])
    assert module.main() == 0
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text(encoding="utf-8").replace("length: 2048", "length: 1024", 1), encoding="utf-8")
    assert module.main() == 1
    assert capsys.readouterr().err.startswith(f"{file.name}: not what lbllm init writes; run: ")


def test_a_stale_drawing_is_found(tmp_path, monkeypatch, capsys):
    module = module_of("draw_architecture")
    monkeypatch.setattr(module, "DOCS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["draw_architecture.py"])
    assert module.main() == 0
    monkeypatch.setattr(sys, "argv", ["draw_architecture.py", "--check"])
    assert module.main() == 0
    drawing = tmp_path / "data-flow.svg"
    drawing.write_text(drawing.read_text(encoding="utf-8").replace("distill-e2e", "distill-end"), encoding="utf-8")
    assert module.main() == 1
    assert capsys.readouterr().err.startswith("data-flow.svg: not what the code says")


def test_drawings_are_of_the_code():
    """Boxes are the packages and the stages, as Python sees them; an import for type checkers alone is none."""
    module = module_of("draw_architecture")
    folders = {path.parent.name for path in (ROOT / "src" / "lbllm_cli").glob("*/__init__.py")}
    found = module.packages()
    assert found.keys() == folders | {"hf"}
    height = module.ranks(found)
    assert all(height[name] > height[other] for name, others in found.items() for other in others)
    for spec, drawn in zip(TABLE, module.stages(), strict=True):
        assert {key: getattr(spec, key) for key in drawn} == drawn
    for name, boxes in (("packages", found), ("data-flow", [spec.name for spec in TABLE])):
        tree = ElementTree.parse(ROOT / "docs" / f"{name}.svg")
        texts = {element.text for element in tree.iter("{http://www.w3.org/2000/svg}text") if element.get("class") == "name"}
        assert texts >= set(boxes)


def test_packages_that_import_each_other_are_refused(monkeypatch):
    module = module_of("draw_architecture")
    found = module.packages()
    found["core"].add("cli")
    with pytest.raises(SystemExit, match="packages import each other: "):
        module.ranks(found)


def test_every_key_has_a_row_with_its_default():
    text = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    phase = {"end_to_end": {}}
    values = {"model": {"path": "none: give one"}, "output": {"dir": "none: give one"}, "distill": phase, "act_calib": phase}

    def check(section: dict, heading: str) -> int:
        _, found, table = text.partition(f"\n## {heading}\n")
        assert found, heading
        rows = [line.split(" | ") for line in table.partition("\n## ")[0].splitlines() if line.startswith("| `")]
        defaults = {row[0].strip("|` "): row[-2].strip("`") for row in rows}
        assert defaults.keys() == section.keys()
        counted = len(defaults)
        for key, value in section.items():
            if isinstance(value, dict) and value:
                counted += check(value, f"{heading}.{key}")
            elif not isinstance(value, list) or not any(isinstance(item, dict) for item in value):
                assert yaml.safe_load(defaults[key]) == (value if value != "none: give one" else {"none": "give one"}), key
        return counted

    dumped = Recipe.model_validate(values).model_dump(mode="json")
    del dumped["recipe_version"]
    assert sum(check(section, name) for name, section in dumped.items()) > 100


def test_the_page_about_models_has_every_family():
    from lbllm_cli.models.families import FAMILIES

    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ") and "`" in line.split("|")[2]]
    assert {line.split("`")[1] for line in rows} == {"model_type", *FAMILIES}
    for family in FAMILIES.values():
        assert all(f"inside `{outer}`" in page for outer in family.within)
