#!/usr/bin/env python3
"""Whether exports of one checkpoint in several formats write the same text: greedy, float32, activations in full precision.

    python scripts/same_tokens.py runs/packed/export runs/compressed/export runs/gguf/export --tokens 64

A folder with model.gguf is read by transformers' own reader of GGUF, tokenizer too. Exit code 1 where one writes other tokens
than the first.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lbllm_cli.hf


@torch.no_grad()
def written(folder: Path, prompt: str, count: int) -> tuple[list[int], str]:
    """Tokens of the prompt and `count` that follow it, and their text."""
    options: dict[str, Any] = {"gguf_file": "model.gguf"} if (folder / "model.gguf").exists() else {}
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    lbllm_cli.hf.quantize_activations(model, False)
    tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
    found = model.generate(tokens, max_new_tokens=count, do_sample=False, pad_token_id=0, eos_token_id=None)[0]
    return found.tolist(), tokenizer.decode(found)


def main() -> int:
    """Prints a line for each folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--prompt", default="The sea was calm, and")
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    first: list[int] = []
    differs = 0
    for folder in arguments.folders:
        tokens, text = written(folder, arguments.prompt, arguments.tokens)
        first = first or tokens
        same = next((i for i, (a, b) in enumerate(zip(first, tokens, strict=False)) if a != b), None)
        differs |= int(tokens != first)
        print(f"{folder}: {'the same' if tokens == first else f'differs from token {same} on'}: {text!r}", flush=True)
    return differs


if __name__ == "__main__":
    sys.exit(main())
