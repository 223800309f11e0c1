"""`lbllm config`: what a recipe is once it is read, which recipes come with the package, and what a recipe may say."""

from pathlib import Path

from lbllm_cli.core.errors import UsageError
from lbllm_cli.recipe.json_schema import schema_text
from lbllm_cli.recipe.load import dump_recipe, load_recipe
from lbllm_cli.recipe.shipped import first_words, shipped_recipes


def print_recipe(path: Path | None, overrides: list[str] | None, stages: bool) -> None:
    """The resolved recipe, or its stages."""
    if path is None:
        raise UsageError("config needs --recipe, a file or one of the names of lbllm config --list")
    recipe = load_recipe(path, overrides)
    if not stages:
        print(dump_recipe(recipe), end="")
        return
    for spec in recipe.stages:
        print(f"{spec}\t{recipe.parent(spec) or '-'}\tlbllm {spec.own_command}")


def print_list() -> None:
    """Names of the shipped recipes, and what each says of itself, apart by a tab."""
    for name, path in shipped_recipes().items():
        print(f"{name}\t{first_words(path)}")


def print_schema() -> None:
    """The JSON schema."""
    print(schema_text(), end="")
