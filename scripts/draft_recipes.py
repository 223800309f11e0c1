"""Writes the recipes in recipes/ that `lbllm init` makes, for a machine with a GPU of 24 GB.

    python scripts/draft_recipes.py             write them
    python scripts/draft_recipes.py --check     exit code 1 where one is not what lbllm init writes
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from lbllm_cli.cli.draft import draft
from lbllm_cli.cli.machine import Machine, PlacedModel
from lbllm_cli.recipe.shipped import MODELINE, SCHEMA

ROOT = Path(__file__).parents[1]
RECIPES, CONFIGS = ROOT / "recipes", ROOT / "tests" / "assets" / "configs"
GIB = 1 << 30
# What a driver leaves of the card.
MACHINE = Machine("cuda", "RTX 4090", int(23.5 * GIB), 60 * GIB, 500 * GIB, 16)


@dataclass(frozen=True)
class Kept:
    """A recipe that is kept. name: of its file. path: of the model on the hub. config: its folder. chat: it has a template."""

    name: str
    path: str
    config: str
    chat: bool


KEPT = (
    Kept("llama3.1-8b", "meta-llama/Llama-3.1-8B", "Llama-3.1-8B", chat=False),
    Kept("qwen3-8b", "Qwen/Qwen3-8B", "Qwen3-8B", chat=True),
    Kept("qwen3-30b-a3b", "Qwen/Qwen3-30B-A3B", "Qwen3-30B-A3B", chat=True),
    Kept("gemma3-1b", "google/gemma-3-1b-it", "Gemma-3-1B", chat=True),
    Kept("gemma3-4b", "google/gemma-3-4b-it", "Gemma-3-4B", chat=True),
    Kept("phi4", "microsoft/phi-4", "Phi-4", chat=True),
)


def text(kept: Kept) -> str:
    """A recipe as `lbllm init` writes it into recipes/."""
    model = PlacedModel.open(str(CONFIGS / kept.config), MACHINE)
    return f"{MODELINE}{SCHEMA}\n{draft(model, kept.path, f'recipes/{kept.name}.yaml', kept.chat).text}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    stale = []
    for kept in KEPT:
        file, wanted = RECIPES / f"{kept.name}.yaml", text(kept)
        if not file.exists() or file.read_text(encoding="utf-8") != wanted:
            stale.append(file.name)
            if not check:
                file.write_text(wanted, encoding="utf-8")
    if check and stale:
        print(f"{', '.join(stale)}: not what lbllm init writes; run: python scripts/draft_recipes.py", file=sys.stderr)
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
