"""The wheel: what is in it, for whom it is, and what becomes of it where nothing compiles C++."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
from conftest import ROOT

from lbllm_cli.engine.location import library_path
from lbllm_cli.recipe.load import load_recipe

SOURCES, RECIPES = ROOT / "src", ROOT / "recipes"
# Of the recipes those that name folders of a checkout.
IN_A_CHECKOUT = {
    "batch.mk", "demo.yaml", "gemma3-270m.yaml", "gemma3-270m-groups-of-16.yaml", "smollm2-135m.yaml",
    "smollm2-135m-end-to-end.yaml", "smollm2-135m-2.5-bits.yaml", "smollm2-135m-groups-of-16.yaml", "toy.yaml",
    "toy-experts.yaml",
}  # fmt: skip
LIBRARY = "lbllm_cli/engine/liblbllm_kernels"

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")), reason="no C++ compiler"
)


def build(folder: Path, **environment: str) -> tuple[Path, str]:
    """The checkout's wheel, and what was printed while it was built."""
    command = [sys.executable, "-m", "pip", "wheel", "--verbose", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    done = subprocess.run(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if "No matching distribution found for scikit-build-core" in done.stdout:
        pytest.skip("no package index: the build's own requirements cannot be fetched")
    assert done.returncode == 0, done.stdout
    (wheel,) = folder.glob("*.whl")
    return wheel, done.stdout


def packaged(wheel: Path) -> set[str]:
    return {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}


def expected() -> set[str]:
    """Every file of the package, code and data, but for the C++ sources, and the recipes."""
    files = (path.relative_to(SOURCES) for path in (SOURCES / "lbllm_cli").rglob("*") if path.is_file())
    recipes = {f"lbllm_cli/recipes/{path.name}" for path in RECIPES.iterdir() if path.name not in IN_A_CHECKOUT}
    return recipes | {path.as_posix() for path in files if not {"__pycache__", "native"} & set(path.parts)}


# A whole build of the library: the one that the tests run in has been built by the same files.
@pytest.mark.slow
@needs_compiler
def test_wheel_is_for_every_python_and_holds_the_package_and_a_library_that_loads(tmp_path):
    wheel, _ = build(tmp_path)
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    (library,) = packaged(wheel) - expected()
    assert library.startswith(LIBRARY)
    assert expected() <= packaged(wheel)
    ctypes.CDLL(ZipFile(wheel).extract(library, tmp_path))


def test_without_a_compiler_the_wheel_lacks_the_library_alone_and_the_build_says_so(tmp_path):
    wheel, printed = build(tmp_path, CXX=str(tmp_path / "absent"))
    assert packaged(wheel) == expected()
    assert "No C++ compiler" in printed


def test_recipes_of_the_wheel_need_no_checkout_and_are_found_in_it(tmp_path):
    """As in an installation, where the package has no checkout around it; the compiled library is not needed for that."""
    wheel, _ = build(tmp_path, CXX=str(tmp_path / "absent"))
    ZipFile(wheel).extractall(tmp_path / "site")
    names = {path.stem for path in RECIPES.glob("*.yaml") if path.name not in IN_A_CHECKOUT}
    assert len(names) > 0
    found = subprocess.run(
        [sys.executable, "-S", "-c", _LIST, str(tmp_path / "site"), *sys.path], cwd=tmp_path, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert {line.split("\t")[0] for line in found.stdout.splitlines()} == names
    for name in names:
        model = load_recipe(RECIPES / f"{name}.yaml").model.path
        assert not model.startswith(("models/", "tests/", "/")), f"{name} names {model}"


# Without `site`, which would bring the editable installation's finder.
_LIST = "import sys; sys.path[:] = sys.argv[1:]; from lbllm_cli.cli.app import app; app(['config', '--list'])"


@needs_compiler
def test_this_installation_finds_its_library():
    path = library_path()
    assert path is not None
