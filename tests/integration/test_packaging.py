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

from lbllm_cli.runtime.cpu.location import library_path

SOURCES = ROOT / "src"
LIBRARY = "lbllm_cli/runtime/cpu/liblbllm_kernels"

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
    """Every file of the package, code and data, but for the C++ sources."""
    files = (path.relative_to(SOURCES) for path in (SOURCES / "lbllm_cli").rglob("*") if path.is_file())
    return {path.as_posix() for path in files if not {"__pycache__", "native"} & set(path.parts)}


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


@needs_compiler
def test_this_installation_finds_its_library():
    path = library_path()
    assert path is not None
