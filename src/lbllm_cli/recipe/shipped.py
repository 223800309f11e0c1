"""Recipes that come with the package: found by name from any folder."""

import difflib
import re
from itertools import takewhile
from pathlib import Path

from lbllm_cli.core.errors import UsageError

SCHEMA = "recipe.schema.json"
# The first line of a recipe, for editors; behind it stands where the schema is.
MODELINE = "# yaml-language-server: $schema="
_SUFFIX = ".yaml"


def shipped_folder() -> Path:
    """Where they lie: in the package, or in the checkout that an editable installation is of."""
    package = Path(__file__).parents[1]
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parents[1] / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """Name -> file."""
    return {path.stem: path for path in sorted(shipped_folder().glob(f"*{_SUFFIX}"))}


def first_words(path: Path) -> str:
    """What a recipe says of itself: the first sentence of its comments that is for readers."""
    lines = (line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith(MODELINE))
    paragraph = takewhile(bool, (line.removeprefix("#").strip() for line in takewhile(lambda line: line.startswith("#"), lines)))
    return re.split(r"(?<=\.)\s", " ".join(paragraph), maxsplit=1)[0]


def find_recipe(path: Path) -> Path:
    """The file that `--recipe` means: one that is there, else the shipped recipe of that name.

    Raises UsageError for a name that neither has, with the names that there are.
    """
    if path.name != str(path) or path.suffix in {".yml", ".json"} or (path.exists() and not path.is_dir()):
        return path
    name, recipes = path.name.removesuffix(_SUFFIX), shipped_recipes()
    if name in recipes:
        return recipes[name]
    if path.is_dir():
        return path
    near = difflib.get_close_matches(name[:200], recipes, n=1)
    meant = f"did you mean `{near[0]}`? " if near else ""
    raise UsageError(
        f"recipe {path} does not exist; give an existing file to --recipe, or the name of a recipe that comes with lbllm: "
        f"{meant}there are {', '.join(recipes)}"
    )
