"""The guard library, compiled for the torch at hand: once for each torch and each source."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")
# Beside what else pytest keeps.
FOLDER = Path(__file__).resolve().parents[2] / ".pytest_cache" / "d" / "simulated_gpu"


def compiler() -> str | None:
    """The C++ compiler, None where there is none."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def library(folder: Path) -> Path:
    """The compiled guard in a folder, made where it is not there yet.

    Raises RuntimeError with what the compiler says where it refuses.
    """
    import torch
    from torch.utils.cpp_extension import include_paths

    own = Path(torch.__file__).parent / "lib"
    key = hashlib.sha256(f"{torch.__version__} {own}".encode() + SOURCE.read_bytes()).hexdigest()[:16]
    path = folder / f"guard-{key}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    # Another process may be at it as well: whoever is last replaces the same bytes.
    unfinished = path.with_suffix(f".{os.getpid()}")
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    command = [compiler() or "g++", "-std=c++20", "-O1", "-shared", "-fPIC", abi, *(f"-I{found}" for found in include_paths())]
    command += [str(SOURCE), f"-L{own}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{own}", "-o", str(unfinished)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{SOURCE.name} cannot be compiled for torch {torch.__version__}:\n{done.stderr}")
    os.replace(unfinished, path)
    return path


def preload() -> None:
    """Begins this process again with the guard in it, and with kernels interpreted, where it is not there yet."""
    path = str(library(FOLDER))
    if path in os.environ.get("LD_PRELOAD", "").split(":"):
        return
    os.environ["LD_PRELOAD"] = ":".join(filter(None, (path, os.environ.get("LD_PRELOAD"))))
    os.environ |= {"TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    os.execv(sys.executable, [sys.executable, *sys.argv])
