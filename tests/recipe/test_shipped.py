"""Recipes that come with the package are found by name, and whatever is there under that name goes first."""

from pathlib import Path

import pytest
from conftest import ROOT

from lbllm_cli.core.errors import UsageError
from lbllm_cli.recipe import shipped
from lbllm_cli.recipe.load import load_recipe
from lbllm_cli.recipe.shipped import MODELINE, SCHEMA, find_recipe, first_words, shipped_recipes

RECIPES = ROOT / "recipes"


@pytest.mark.parametrize("name", ["llama2-7b", "llama2-7b.yaml", "qwen2.5-3b"])
def test_a_name_is_found_from_any_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    file = RECIPES / f"{name.removesuffix('.yaml')}.yaml"
    assert find_recipe(Path(name)) == file
    assert load_recipe(Path(name), ["ptq.group_size=64"]) == load_recipe(file, ["ptq.group_size=64"])


def test_recipe_dir_is_the_folder_of_the_shipped_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(load_recipe(Path("toy")).model.path).resolve() == ROOT / "tests" / "assets" / "toy"


def test_what_is_there_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "llama2-7b.yaml"
    own.write_text("model: {path: mine}\noutput: {dir: o}\n", encoding="utf-8")
    assert load_recipe(Path("llama2-7b.yaml")).model.path == "mine"
    # A run's folder, or a model's, may well have the name of its recipe.
    (tmp_path / "llama3-8b").mkdir()
    assert load_recipe(Path("llama3-8b")).model.path == "meta-llama/Meta-Llama-3-8B"
    (tmp_path / "other").mkdir()
    with pytest.raises(UsageError, match="other is a folder; expected a file"):
        load_recipe(Path("other"))


def test_an_unknown_name_is_refused_with_those_that_there_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"recipe llama3-7b does not exist; .*did you mean `llama\S+`\? there are ") as caught:
        load_recipe(Path("llama3-7b"))
    assert str(caught.value).endswith(", ".join(shipped_recipes()))
    with pytest.raises(UsageError, match=r"to --recipe, or the name of a recipe that comes with lbllm: there are"):
        load_recipe(Path("zzz.yaml"))


@pytest.mark.parametrize("path", ["recipes/llama2-7b", "./nowhere/llama2-7b.yaml", "llama2-7b.json"])
def test_a_path_is_no_name(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"does not exist; give an existing file to --recipe$"):
        load_recipe(Path(path))


def test_a_package_with_recipes_in_it_needs_no_checkout(tmp_path, monkeypatch):
    module = tmp_path / "lbllm_cli" / "recipe" / "shipped.py"
    (tmp_path / "lbllm_cli" / "recipes").mkdir(parents=True)
    (tmp_path / "lbllm_cli" / "recipes" / "one.yaml").write_text("# One.\n", encoding="utf-8")
    monkeypatch.setattr(shipped, "__file__", str(module))
    assert list(shipped_recipes()) == ["one"]


def test_every_recipe_names_the_schema_and_says_what_it_is():
    assert len(shipped_recipes()) >= 7
    for name, path in shipped_recipes().items():
        assert path.read_text(encoding="utf-8").startswith(f"{MODELINE}{SCHEMA}\n# "), name
        assert len(first_words(path)) > 20, name
        assert first_words(path).endswith("."), name


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("# At 2.5 bits, of\n# two lines. More.\n#\n# Run: x.", "At 2.5 bits, of two lines."),
        ("# No point at\n# the end\n#\n# Run: x.", "No point at the end"),
        ("# One line\nmodel: {path: m}.", "One line"),
        ("model: {path: m}", ""),
    ],
)
def test_the_first_sentence_is_whole(tmp_path, lines, words):
    file = tmp_path / "r.yaml"
    file.write_text(f"{MODELINE}{SCHEMA}\n{lines}\n", encoding="utf-8")
    assert first_words(file) == words
