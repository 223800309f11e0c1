"""Every refusal at the command line, word for word: `refusal_cases` has what leads to each, and how to record them anew."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ASSETS
from integration.refusal_cases import CASES, Case, build, message

RECORDED = ASSETS / "refusals.json"
RECORDING = bool(os.environ.get("LBLLM_RECORD"))
_MADE = pytest.StashKey[dict[str, Path]]()
COMMANDS = ("ptq", "distill", "act-calib", "eval", "report", "export", "generate", "validate", "config")


@pytest.fixture(scope="module")
def recorded() -> Iterator[dict[str, Any]]:
    """Exit code and message of each case; what is put into it while recording is written at the end."""
    found = json.loads(RECORDED.read_text(encoding="utf-8")) if RECORDED.exists() else {}
    yield found
    if RECORDING:
        names = {case.name for case in CASES}
        kept = {name: found[name] for name in sorted(names & found.keys())}
        RECORDED.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@pytest.fixture
def base(request, lbllm, tmp_path_factory) -> Path:
    """The folder that a case's is a copy of, made once for all cases."""
    name = request.node.callspec.params["case"].base
    made = request.config.stash.setdefault(_MADE, {})
    if name not in made:
        folder = tmp_path_factory.mktemp(name)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            build(lbllm, name)
        made[name] = folder
    return made[name]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refusal(case: Case, base, recorded, lbllm, tmp_path, monkeypatch, request):
    folder = Path(shutil.copytree(base, tmp_path / "case"))
    monkeypatch.chdir(folder)
    # typer breaks its lines at the width of the terminal.
    monkeypatch.setenv("COLUMNS", "10000")
    if case.kernels is not None:
        request.getfixturevalue("in_torch")
        monkeypatch.setenv("LBLLM_KERNELS", case.kernels)
    with pytest.MonkeyPatch.context() as patch:
        case.setup(patch)
        result = lbllm(*case.line)
    found = {"exit_code": result.exit_code, "message": message(result.stderr, folder, case.library)}
    assert found["exit_code"] != 0, result.stderr
    # What was wrong from the beginning gives no result.
    assert found["exit_code"] != 2 or not result.stdout.strip()
    if RECORDING:
        recorded[case.name] = found
    assert found == recorded[case.name]


def test_the_table_is_whole(recorded):
    assert len({case.name for case in CASES}) == len(CASES)
    assert {case.line[0] for case in CASES} >= set(COMMANDS)
    assert RECORDING or recorded.keys() == {case.name for case in CASES}
