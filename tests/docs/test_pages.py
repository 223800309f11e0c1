"""Every page: links lead somewhere, and commands are ones that can be given. Those of the README are run: see test_readme."""

import re
import shlex
from collections.abc import Iterator
from itertools import takewhile

import pytest
import typer
from conftest import ROOT

from lbllm_cli.cli.app import app
from lbllm_cli.recipe.load import load_recipe

PAGES = [name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md") if (ROOT / name).exists()]
PAGES += sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
COMMANDS = typer.main.get_command(app).commands
# What stands for something of the reader's.
PLACEHOLDER = re.compile(r"\.\.\.|\b[A-Z]{2,}\b(?!=)|<\w+>")


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def headings(text: str) -> set[str]:
    """Anchors of a page, as GitHub makes them."""
    found = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in found}


def commands(page: str, program: str) -> Iterator[list[str]]:
    """Command lines of a page, in blocks and in the text, as their words."""
    text = read(page)
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))]
    for line in lines:
        words = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", line)
        if re.match(rf"{program}", words) and not PLACEHOLDER.search(words.partition("  #")[0].strip()):
            yield shlex.split(words, comments=True)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    text = read(page)
    for path, anchor in re.findall(r"\]\((?!\w+://)([^)#]*)(?:#([\w-]+))?\)", text):
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), path
        if anchor:
            assert anchor in headings(target.read_text(encoding="utf-8")), f"{path}#{anchor}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_lbllm_can_be_given(page):
    for _, name, *words in commands(page, "lbllm [a-z]"):
        arguments = list(takewhile(">".__ne__, words))  # what follows is the shell's
        if name == "init":
            arguments = arguments or ["model"]
        elif "--model" not in arguments and "--recipe" not in arguments:  # the name of a command, perhaps with an option
            needed = {"generate": ["--model", "m", "--prompt", "p"], "serve": ["--model", "m"], "chat": ["--model", "m"]}
            arguments += needed.get(name, ["--recipe", "recipes/toy.yaml"])
        context = COMMANDS[name].make_context(name, arguments)
        if recipe := context.params.get("recipe"):
            load_recipe(ROOT / recipe if recipe.suffix else recipe, list(context.params["overrides"] or []))


@pytest.mark.parametrize("page", PAGES)
def test_scripts_have_the_options_that_are_named(page):
    for words in commands(page, r"(?:\.venv/bin/)?python scripts/\w+\.py"):
        script = ROOT / words[1]
        text = script.read_text(encoding="utf-8")
        # What follows -- is another program's.
        for option in (word for word in takewhile("--".__ne__, words) if word.startswith("--")):
            assert f'"{option}"' in text, f"{script.name} {option}"


@pytest.mark.parametrize("page", PAGES)
def test_targets_and_tests_are_there(page):
    targets = set(re.findall(r"^([\w -]+):", read("Makefile"), flags=re.MULTILINE))
    models = {f"models/{name}/config.json" for name in ("smollm2-135m", "gemma3-270m")}
    names = {name for target in targets for name in target.split()} | models
    for words in commands(page, "make "):
        if "-f" in words:
            assert (ROOT / words[words.index("-f") + 1]).exists()
            continue
        named = [word for word in words[1:] if "=" not in word]
        assert set(named) <= names, words
    tests = re.findall(r"(?<![\w/])tests(?:/[\w.]+)+", read(page))
    for path in tests:
        assert (ROOT / path.rstrip(".")).exists() or (ROOT / path.rstrip(".")).with_suffix(".py").exists(), path


def test_mistakes_are_found():
    """The checks above would pass if they looked at nothing."""
    found = [words for page in PAGES for words in commands(page, "lbllm [a-z]")]
    assert len(found) >= 20
    assert {words[1] for words in found} == COMMANDS.keys()
    assert sum(1 for page in PAGES for _ in commands(page, r"python scripts/\w+\.py")) >= 10
    assert sum(1 for page in PAGES for _ in commands(page, "make ")) >= 6
    with pytest.raises(Exception, match="No such option"):
        COMMANDS["ptq"].make_context("ptq", ["--recipe", "recipes/toy.yaml", "--fast"])


def test_python_of_the_pages_is_the_readmes():
    def blocks(page: str) -> list[str]:
        return re.findall(r"```python\n(.*?)```", read(page), flags=re.DOTALL)

    for page in PAGES:
        # That of serving is run against a server, in tests/cli/test_serve.py.
        if page != "docs/serving.md":
            assert set(blocks(page)) <= set(blocks("README.md")), page


def test_recipes_of_the_pages_are_valid(tmp_path):
    for page in PAGES:
        for block in re.findall(r"```yaml\n(.*?)```", read(page), flags=re.DOTALL):
            (tmp_path / "recipe.yaml").write_text(block, encoding="utf-8")
            load_recipe(tmp_path / "recipe.yaml")
