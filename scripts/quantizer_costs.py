#!/usr/bin/env python3
"""Print what each kind of activation quantizer of a packed export costs alone: KL to the full-precision model, nats, by style.

    python scripts/quantizer_costs.py --export runs/smollm2-135m/export --model models/smollm2-135m

One segment of the bundled evaluation text a style. The first row is weights alone, the last all quantizers together.
"""

import argparse
import os
import sys
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from lbllm_cli.data.sources import STYLES, builtin_records

# In torch, as stages are measured: in kernels a value may round to the code beside.
os.environ["LBLLM_KERNELS"] = "off"


def segments(tokenizer: object, length: int) -> dict[str, Tensor]:
    """The first tokens of each style: int64 [1, length]."""
    found = {}
    for style in STYLES:
        # Of prose a token is about four characters.
        text = "\n\n".join(record["text"] for record in builtin_records("evaluation", style))[: 16 * length]
        found[style] = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][:, :length]  # type: ignore[operator]
    return found


@torch.no_grad()
def divergences(model: torch.nn.Module, teacher: dict[str, Tensor], tokens: dict[str, Tensor]) -> list[float]:
    """Mean KL of each style. teacher: log-probabilities [length, vocab]."""
    found = []
    for style, rows in tokens.items():
        student = model(rows, use_cache=False).logits[0].float().log_softmax(-1)
        found.append(float((teacher[style].exp() * (teacher[style] - student)).sum(-1).mean()))
    return found


def costs(export: Path, model: Path, length: int, dtype: torch.dtype) -> dict[str, list[float]]:
    """Divergences by what is quantized: `weights`, each kind of quantizer by its name in a block, `all`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import lbllm_cli.hf  # noqa: F401 - registers the packed format
    from lbllm_cli.runtime.quantizer import ActQuantizer

    student = AutoModelForCausalLM.from_pretrained(export, dtype=dtype).eval()
    source = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    tokens = segments(AutoTokenizer.from_pretrained(export), length)
    with torch.no_grad():
        teacher = {style: source(rows).logits[0].float().log_softmax(-1) for style, rows in tokens.items()}
    kinds: dict[str, list[ActQuantizer]] = defaultdict(list)
    for name, module in student.named_modules():
        if isinstance(module, ActQuantizer):
            kinds[name.split(".", 3)[-1]].append(module)
    if not kinds:
        raise SystemExit(f"{export} has no activation quantizers; export a checkpoint of act-calib")
    every = [quantizer for group in kinds.values() for quantizer in group]
    found = {}
    for name, on in {"weights": [], **kinds, "all": every}.items():
        for quantizer in every:
            quantizer.enabled = any(quantizer is one for one in on)
        found[name] = divergences(student, teacher, tokens)
    return found


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="KL of each kind of activation quantizer alone.")
    parser.add_argument("--export", type=Path, required=True, help="folder of `lbllm export`, packed, with quantizers")
    parser.add_argument("--model", type=Path, required=True, help="the full-precision model")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a style (default: 1024)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="(default: bfloat16)")
    args = parser.parse_args(argv)
    for name, values in costs(args.export, args.model, args.length, getattr(torch, args.dtype)).items():
        print(f"{name:<24}", *(f"{value:8.4f}" for value in values))
    return 0


if __name__ == "__main__":
    sys.exit(main())
