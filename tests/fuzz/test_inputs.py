"""Whatever a user puts in: one message and an exit code, nothing lost, nothing that hangs. See `promise.py`."""

import random
from pathlib import Path
from types import ModuleType

import data_cases
import export_cases
import model_cases
import pytest
import recipe_cases
import session
import stage_cases
from bases import LOCK, RECIPE, build, copied, stage_writes
from promise import Case, broken, check, prepare, snapshot
from runner import Result, Server
from session import seeds
from shared import shared

CLASSES: dict[str, ModuleType] = {
    "recipes": recipe_cases,
    "models": model_cases,
    "data": data_cases,
    "stages": stage_cases,
    "exports": export_cases,
}
# Cases of a class in every run of the tests, each of its kinds among them, and where slow ones run too.
NORMAL, ALL = max(len(module.KINDS) for module in CLASSES.values()), 220


def folder_of(server: Server, name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that cases of a class are copies of."""
    return shared(tmp_path_factory.getbasetemp(), f"base-{name}", lambda folder: build(server, folder, name))


@pytest.fixture
def server(tmp_path_factory) -> Server:
    return session.server(tmp_path_factory.getbasetemp())


@pytest.mark.parametrize("seed", seeds(NORMAL, ALL))
@pytest.mark.parametrize("name", CLASSES)
def test_inputs(name, seed, server, tmp_path, tmp_path_factory):
    folder, base = tmp_path / "case", folder_of(server, name, tmp_path_factory)
    work = copied(base, folder)
    kinds, rng = CLASSES[name].KINDS, random.Random(f"{name} {seed}")
    case = kinds[seed % len(kinds)](work, rng)
    wrong, result = check(server, folder, case, snapshot(base) if case.ends_as else None)
    if wrong:
        again = f"LBLLM_FUZZ_SEED={seed} LBLLM_FUZZ_CASES=1 python -m pytest tests/fuzz/test_inputs.py -k {name}"
        shown = "\n".join(result.stderr.splitlines()[-12:])[-3000:]
        pytest.fail(f"{'; '.join(wrong)}\n{case.kind}\nlbllm {case.arguments}\n{again}\n{shown}", pytrace=False)


@pytest.mark.parametrize(
    ("name", "line", "writes"),
    [
        ("recipes", ["ptq"], stage_writes("ptq")),
        ("models", ["generate", "--model", "model"], ()),
        ("data", ["eval"], (*LOCK, "work/run/eval*")),
        ("stages", ["distill", "--only", "blocks"], stage_writes("distill")),
        ("stages", ["export", "--dry-run"], LOCK),
        *(("exports", ["generate", "--model", folder], ()) for folder in export_cases.EXPORTS),
    ],
)
def test_bases_are_fine(name, line, writes, server, tmp_path, tmp_path_factory):
    """Without a mutation every class ends with 0: what is refused is refused for its mutation."""
    folder = tmp_path / "case"
    copied(folder_of(server, name, tmp_path_factory), folder)
    more = ["--prompt", "The sea", "--max-new-tokens", "3"] if line[0] == "generate" else ["--recipe", RECIPE]
    wrong, result = check(server, folder, Case("nothing", [*line, *more], writes, "done"))
    assert not wrong, result.stderr


def test_the_promise_is_noticed_when_it_is_broken(tmp_path):
    work = prepare(tmp_path)
    before = snapshot(tmp_path)
    (work / "precious.txt").write_text("Other words.\n")
    (work / "new.txt").touch()
    (tmp_path / "beside" / "precious.txt").unlink()
    after, case = snapshot(tmp_path), Case("", [], ("work/new.*",), "refused")

    def said(code: int = 2, stderr: str = "lbllm: no\n", late: bool = False, memory: int = 0) -> list[str]:
        return broken(case, before, after, Result(code, "", stderr, 1.0, memory, late, 0))

    touched = ["touched beside/precious.txt: deleted", "touched work/precious.txt: changed"]
    assert said() == touched
    assert said(code=0, stderr="") == ["exit code 0, expected a refusal", *touched]
    assert said(code=-11)[0] == "exit code -11"
    assert said(stderr="Traceback (most recent call last):\n")[0] == "a traceback"
    assert said(stderr="lbllm: no\nlbllm: again\n")[0] == "2 messages of failure, expected one"
    assert said(late=True, memory=2 << 30)[0] == "ran longer than 20 s"
    assert "2.0 GiB of memory" in said(memory=2 << 30)
