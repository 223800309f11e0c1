#!/usr/bin/env python3
"""How far the perplexity of an exported folder moves when its embedding does by 1e-6, through the kernels and in torch.

    python scripts/perplexity_noise.py runs/smollm2-135m/export --seeds 0 1 2 3
    LBLLM_KERNELS=off python scripts/perplexity_noise.py runs/smollm2-135m/export --seeds 0 1 2 3

A 4-bit quantizer turns the last bit of an input into another code now and then, and thirty blocks make that large; so two correct
implementations agree within this spread and not to the last digit. Seed 0 is the folder as it is. A perplexity of 12 segments
takes about six minutes in torch, on one core.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lbllm_cli.hf  # noqa: F401  registers the packed format
from lbllm_cli.data.tokens import evaluation_tokens
from lbllm_cli.engine.abi import library, tier
from lbllm_cli.evaluation.perplexity import whole_perplexity
from lbllm_cli.recipe.text import EvaluationSet

NOISE = 1e-6


def noisy_model(folder: Path, seed: int) -> torch.nn.Module:
    """The exported model in float32, its embedding times 1 + 1e-6 of normal noise; a tied head keeps its weights."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if seed:
        weight = model.get_input_embeddings().weight
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        model.set_input_embeddings(torch.nn.Embedding.from_pretrained(weight * (1 + NOISE * noise)))
    return model


def main() -> None:
    """Reads the arguments and prints a row per engine and seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="written by `lbllm export`")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--text", default="builtin:evaluation/novels")
    parser.add_argument("--length", type=int, default=1024, help="tokens in a segment")
    parser.add_argument("--segments", type=int, default=12)
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    text = EvaluationSet(name="text", source=arguments.text, length=arguments.length, segments=arguments.segments)
    tokens = evaluation_tokens(text, tokenizer, len(tokenizer))
    used = library()
    print(f"{'torch' if used is None else f'kernels, {tier(used)}'}\n| seed | perplexity |\n|---:|---:|", flush=True)
    for seed in arguments.seeds:
        found = whole_perplexity(noisy_model(arguments.folder, seed), tokens, torch.device("cpu"))
        print(f"| {seed} | {found:.2f} |", flush=True)


if __name__ == "__main__":
    main()
