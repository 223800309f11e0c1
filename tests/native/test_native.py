"""The C++ library by itself: under sanitizers against plain loops, and AVX-512 and AVX-VNNI emulated where no CPU has them."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

NATIVE = Path(__file__).parent
SOURCES = ROOT / "src" / "lbllm_cli" / "engine" / "native"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
X86 = platform.machine() in ("x86_64", "AMD64")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
TIERS = {
    "portable": (),
    "avx2": AVX2,
    "avxvnni": (*AVX2, "-mavxvnni"),
    "avx512": (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"),
}
# gcc 12 finds fault with its own AVX-512 headers.
COMMON = ("-std=c++17", "-fopenmp", "-ffp-contract=off", "-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized")
# Without optimization: these compile in a fifth of the time, and the installed library is checked as it is.
SANITIZED = ("-O0", "-Wall", "-Wextra", "-fsanitize=address")
NOT_RUN = 77

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def compiled(source: Path, folder: Path, *flags: str) -> Path:
    """An object file of a source."""
    target = folder / f"{source.stem}.o"
    command = [str(COMPILER), *COMMON, f"-I{SOURCES}", *flags, "-c", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


def understood(*flags: str) -> bool:
    command = [str(COMPILER), *COMMON, *flags, "-E", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def run(objects: list[Path], folder: Path, *flags: str) -> str:
    """What the program of these objects prints; skips where it finds no tier to run."""
    program = folder / "check"
    command = [str(COMPILER), *COMMON, *flags, *map(str, objects), "-o", str(program)]
    linked = subprocess.run(command, capture_output=True, text=True, check=False)
    if linked.returncode and "san" in linked.stderr and "cannot find" in linked.stderr:
        pytest.skip("no sanitizers for this compiler")
    assert linked.returncode == 0, linked.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "3"}, check=False)
    if done.returncode == NOT_RUN:
        pytest.skip("this CPU has no AVX2 to emulate on")
    assert done.returncode == 0, done.stdout[:4000] + done.stderr[:4000]
    return done.stdout


@pytest.fixture(scope="module")
def check(tmp_path_factory) -> Path:
    """The test program's own part."""
    return compiled(NATIVE / "check.cpp", tmp_path_factory.mktemp("check"), *SANITIZED)


@pytest.mark.slow
def test_every_tier_of_this_cpu_is_right_under_sanitizers(tmp_path, check):
    flags = (*SANITIZED, "-fsanitize=undefined", "-fno-sanitize-recover=undefined")
    tiers = {name: own for name, own in TIERS.items() if name == "portable" or (X86 and understood(*own))}
    known = [f"-DLBLLM_HAVE_{name.upper()}" for name in tiers if name != "portable"]
    objects = [compiled(SOURCES / f"tier_{name}.cpp", tmp_path, *flags, *own) for name, own in tiers.items()]
    objects += [compiled(SOURCES / f"{name}.cpp", tmp_path, *flags, *known) for name in ("dispatch", "pack", "sample")]
    objects.append(check)
    assert "portable: good" in run(objects, tmp_path, *flags)


@pytest.mark.skipif(not X86, reason="x86 only")
@pytest.mark.parametrize("tier", ["avx512", "avxvnni"])
def test_tiers_that_this_cpu_may_lack_are_right_in_emulation(tier, tmp_path, check):
    if not understood("-include", "simde/x86/avx512.h"):
        pytest.skip("no SIMDe headers (Debian: libsimde-dev)")
    objects = [compiled(SOURCES / f"tier_{tier}.cpp", tmp_path, *SANITIZED, *AVX2, f"-I{NATIVE / 'simde'}")]
    objects.append(compiled(NATIVE / "emulated.cpp", tmp_path, *SANITIZED, f"-DEMULATED=tier_{tier}"))
    objects += [compiled(SOURCES / f"{name}.cpp", tmp_path, *SANITIZED) for name in ("pack", "sample")] + [check]
    assert f"{tier}: good" in run(objects, tmp_path, *SANITIZED)


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
@pytest.mark.parametrize("tier", TIERS)
def test_a_tier_shares_no_function_with_another(tier, tmp_path):
    """Of a weak function, a template's say, the linker keeps one copy for all tiers, and it may be the AVX-512 one."""
    if tier != "portable" and not (X86 and understood(*TIERS[tier])):
        pytest.skip("this compiler does not have it")
    # -O0: whatever is inlined away at -O3 with one compiler, another may leave in.
    compiled(SOURCES / f"tier_{tier}.cpp", tmp_path, "-O0", *TIERS[tier])
    lines = subprocess.run(["nm", "-C", str(tmp_path / f"tier_{tier}.o")], capture_output=True, text=True, check=True).stdout
    symbols = [line.split(maxsplit=2) for line in lines.splitlines() if not line.startswith(" ")]
    assert symbols
    shared = [name for _, kind, name in symbols if kind in "WwVvu" and "__gxx_personality" not in name]
    assert shared == []
    # What the library exports of a tier is its table of functions alone.
    assert [name for _, kind, name in symbols if kind in "TDRBC"] == [f"lbllm::tier_{tier}"]
