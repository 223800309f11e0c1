"""The library under the address sanitizer, called through its Python wrappers with shapes, types and values that do not fit."""

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT, save_toy, write_recipe

HOSTILE = Path(__file__).parent / "hostile.py"
SOURCES = ROOT / "src" / "lbllm_cli" / "engine" / "native"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
AVX2 = ("-mavx2", "-mfma", "-mf16c")
TIERS = {
    "portable": (),
    "avx2": AVX2,
    "avxvnni": (*AVX2, "-mavxvnni"),
    "avx512": (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"),
}
# gcc 12 finds fault with its own AVX-512 headers.
FLAGS = ("-std=c++17", "-fopenmp", "-ffp-contract=off", "-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized")
SANITIZED = ("-O0", "-g1", "-fPIC", "-fvisibility=hidden", "-fsanitize=address")

# Compiling takes ten seconds, torch under the sanitizer twenty more.
pytestmark = pytest.mark.slow


def _runtime() -> str | None:
    """Libraries to load before everything else: the sanitizer's, and that of exceptions, which it looks up at once."""
    if COMPILER is None:
        return None
    names = ("libasan.so", "libstdc++.so.6")
    commands = ([COMPILER, f"-print-file-name={name}"] for name in names)
    found = [subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() for command in commands]
    return ":".join(found) if all(map(os.path.isabs, found)) else None


def _compiled(source: Path, folder: Path, *flags: str) -> Path:
    target = folder / f"{source.stem}.o"
    command = [str(COMPILER), *FLAGS, *SANITIZED, *flags, "-c", str(source), "-o", str(target)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return target


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory) -> Path:
    """The library with every tier of this kind of processor, sanitized."""
    if _runtime() is None:
        pytest.skip("no address sanitizer")
    folder = tmp_path_factory.mktemp("sanitized")
    x86 = platform.machine() in ("x86_64", "AMD64")
    tiers = {name: own for name, own in TIERS.items() if name == "portable" or x86}
    known = [f"-DLBLLM_HAVE_{name.upper()}" for name in tiers if name != "portable"]
    jobs = [(SOURCES / f"tier_{name}.cpp", own) for name, own in tiers.items()]
    # Whatever else there is: a file that is added is in it.
    jobs += [(file, tuple(known)) for file in sorted(SOURCES.glob("*.cpp")) if not file.name.startswith("tier_")]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda job: _compiled(job[0], folder, *job[1]), jobs))
    library = folder / "liblbllm_kernels.so"
    command = [str(COMPILER), *FLAGS, *SANITIZED, "-shared", *map(str, objects), "-o", str(library)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


@pytest.fixture(scope="module", params=[8, 2])
def export(tmp_path_factory, request) -> Path:
    """A packed model with fewer key than query heads, and biases; by bits of its levels."""
    from typer.testing import CliRunner

    from lbllm_cli.cli.app import app

    base = tmp_path_factory.mktemp("export")
    sizes = {"hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
    toy = save_toy(base / "model", "qwen2-biases", num_key_value_heads=2, **sizes)
    weights = {"rounds": 0, "level_bits": request.param, "group_size": 16 if request.param == 2 else 32}
    recipe = write_recipe(base / "r.yaml", toy, base / "run", ptq=weights, act_calib={"parent": "ptq", "epochs": 0})
    for command in ("ptq", "act-calib", "export"):
        result = CliRunner().invoke(app, [command, "--recipe", str(recipe)], catch_exceptions=False)
        assert result.exit_code == 0, result.stderr
    return base / "run" / "export"


@pytest.mark.parametrize("tier", ["portable", "auto"])
def test_hostile_inputs_are_computed_or_refused(tier, sanitized, export):
    environment = {
        **os.environ,
        "LD_PRELOAD": str(_runtime()),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:abort_on_error=0:exitcode=99",
        "HOSTILE_TIER": tier,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, str(HOSTILE), str(sanitized), str(export)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=600)
    lines = done.stdout.splitlines()
    wrong = [line for line in lines if "WRONG" in line]
    reports = [line for line in done.stderr.splitlines() if "ERROR: AddressSanitizer" in line]
    shown = "\n".join([*wrong, *reports, *(done.stderr.splitlines()[-60:] if wrong or done.returncode else [])])
    assert done.returncode == 0, shown
    assert not wrong, shown
    assert not reports, shown
    assert len(lines) > 200, done.stdout
    assert lines[0].startswith("tier portable" if tier == "portable" else "tier ")
