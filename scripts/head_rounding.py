#!/usr/bin/env python3
"""What an embedding and a head in 8 bits cost a full-precision model by themselves: perplexity and KL divergence, in float32.

    python scripts/head_rounding.py --model models/smollm2-135m
"""

import argparse
import math
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lbllm_cli.data.tokens import evaluation_tokens
from lbllm_cli.format.rows import dequantize_rows, quantize_rows
from lbllm_cli.recipe.text import EvaluationSet

STYLES = "novels", "technical", "modern"


def rounded(path: str) -> Any:
    """The model with both tables as an export of `head_bits: 8` has them."""
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tables = {module.weight for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    for weight in tables:
        weight.data.copy_(dequantize_rows(*quantize_rows(weight.data), torch.float32))
    return model


@torch.no_grad()
def main() -> None:
    """Prints a line per style."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--segments", type=int, default=12)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--bos", action="store_true", help="segments begin with BOS, as Gemma's must")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    other, vocab = rounded(args.model), model.config.get_text_config().vocab_size
    for style in STYLES:
        wanted = {"name": style, "source": f"builtin:evaluation/{style}", "length": args.length, "segments": args.segments}
        before = after = divergence = count = 0.0
        for row in evaluation_tokens(EvaluationSet.model_validate({**wanted, "bos": args.bos}), tokenizer, vocab):
            full, found = (net(row[None]).logits[0, :-1].log_softmax(-1) for net in (model, other))
            target = row[1:, None]
            before -= float(full.gather(1, target).sum())
            after -= float(found.gather(1, target).sum())
            divergence += float((full.exp() * (full - found)).sum())
            count += len(target)
        ratio = math.exp((after - before) / count)
        print(f"{style}: perplexity {math.exp(before / count):.2f}, times {ratio:.4f}; KL {divergence / count:.4f}", flush=True)


if __name__ == "__main__":
    main()
