"""Whatever a user puts in: one message and an exit code, nothing lost, nothing that hangs. See `promise.py`."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import data_cases
import export_cases
import model_cases
import pytest
import recipe_cases
import stage_cases
from bases import build, copied
from promise import check
from runner import Server
from seeds import seeds

CLASSES: dict[str, ModuleType] = {
    "recipes": recipe_cases,
    "models": model_cases,
    "data": data_cases,
    "stages": stage_cases,
    "exports": export_cases,
}
# Cases of a class in every run of the tests, and where slow ones run too.
NORMAL, ALL = 30, 220


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("server") / "home")
    yield running
    running.close()


@pytest.fixture(scope="module")
def base(server, tmp_path_factory) -> Callable[[str], Path]:
    """The folder that cases of a class are copies of, made when first asked for."""
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = build(server, tmp_path_factory.mktemp(name) / "base", name)
        return made[name]

    return of


@pytest.mark.parametrize("seed", seeds(NORMAL, ALL))
@pytest.mark.parametrize("name", CLASSES)
def test_inputs(name, seed, server, base, tmp_path):
    folder = tmp_path / "case"
    work = copied(base(name), folder)
    kinds, rng = CLASSES[name].KINDS, random.Random(f"{name} {seed}")
    case = kinds[seed % len(kinds)](work, rng)
    wrong, result = check(server, folder, case)
    if wrong:
        again = f"LBLLM_FUZZ_SEED={seed} LBLLM_FUZZ_CASES=1 python -m pytest tests/fuzz/test_inputs.py -k {name}"
        shown = "\n".join(result.stderr.splitlines()[-12:])[-3000:]
        pytest.fail(f"{'; '.join(wrong)}\n{case.kind}\nlbllm {case.arguments}\n{again}\n{shown}", pytrace=False)
