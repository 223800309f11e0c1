#!/usr/bin/env python3
"""Which linears lose a number out of a long passage: `builtin:retrieval` with some of them quantized, the others not.

    lbllm export --recipe recipes/smollm2-135m.yaml export.checkpoint=ptq export.format=dense
    python scripts/retrieval_parts.py --export runs/smollm2-135m/export --model models/smollm2-135m

`nats` is what the number costs given the passage, mean over passages: it moves where `found`, the share of passages whose number
is the likeliest continuation, says little. Brackets: standard errors.
"""

import argparse
import json
import re
import statistics
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


def parts(blocks: int) -> dict[str, Callable[[int, str], bool]]:
    """What is quantized, by the row's name: of a block's number and a linear's name."""
    third = blocks / 3
    return {
        "nothing": lambda block, linear: False,
        "all": lambda block, linear: True,
        "q, k": lambda block, linear: linear in ("q_proj", "k_proj"),
        "v, o": lambda block, linear: linear in ("v_proj", "o_proj"),
        "gate, up, down": lambda block, linear: linear in MLP,
        "all but q, k": lambda block, linear: linear not in ("q_proj", "k_proj"),
        "all but attention": lambda block, linear: linear not in ATTENTION,
        "first third of the blocks": lambda block, linear: block < third,
        "second third": lambda block, linear: third <= block < 2 * third,
        "last third": lambda block, linear: block >= 2 * third,
    }


def linear_of(name: str) -> tuple[int, str] | None:
    """Block and linear of a weight; None for any other tensor. "model.layers.3.self_attn.q_proj.weight" -> (3, "q_proj")."""
    place = re.search(rf"layers\.(\d+)\.\w+\.({'|'.join((*ATTENTION, *MLP))})\.weight$", name)
    return (int(place[1]), place[2]) if place else None


def passages(tokenizer: Any, limit: int | None) -> list[tuple[torch.Tensor, int]]:
    """Tokens of passage and number, int64 [1, length], and how many of them are the number's."""
    lines = (resources.files("lbllm_cli") / "data/tasks/retrieval.jsonl").read_text().splitlines()
    found = []
    for item in [json.loads(line) for line in lines][:limit]:
        context = tokenizer(item["context"], add_special_tokens=False)["input_ids"]
        whole = tokenizer(f"{item['context']} {item['number']}", add_special_tokens=False)["input_ids"]
        found.append((torch.tensor([whole]), len(whole) - len(context)))
    return found


@torch.no_grad()
def measured(model: Any, items: list[tuple[torch.Tensor, int]]) -> tuple[list[float], list[float]]:
    """Of each passage: whether every token of its number is the likeliest, and the number's nats."""
    found, nats = [], []
    for tokens, count in items:
        logits = model(tokens, use_cache=False, logits_to_keep=count + 1).logits[0, :-1].float()
        target = tokens[0, -count:]
        found.append(float((logits.argmax(-1) == target).all()))
        nats.append(-float(logits.log_softmax(-1).gather(1, target[:, None]).sum()))
    return found, nats


def mean(values: list[float]) -> str:
    """Mean and standard error."""
    return f"{statistics.fmean(values):.3f} ({statistics.stdev(values) / len(values) ** 0.5:.3f})"


def main() -> None:
    """Prints a row of a table per part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--export", type=Path, required=True, help="folder of `lbllm export` with `export.format=dense`")
    parser.add_argument("--model", type=Path, required=True, help="the full-precision model")
    parser.add_argument("--only", nargs="+", help="these rows, by name (default: all)")
    parser.add_argument("--limit", type=int, help="of the passages, the first so many (default: all)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="(default: bfloat16)")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval()
    source = {name: value.clone() for name, value in model.state_dict().items()}
    other = AutoModelForCausalLM.from_pretrained(args.export, dtype=dtype)
    quantized = {name: value for name, value in other.state_dict().items() if name in source}
    rows = parts(model.config.num_hidden_layers)
    unknown = set(args.only or ()) - rows.keys()
    if unknown:
        parser.error(f"--only: {', '.join(sorted(unknown))}; rows are: {'; '.join(rows)}")
    if args.limit is not None and args.limit < 2:
        parser.error(f"--limit: {args.limit}; a standard error takes two passages")
    if unnamed := [name for name in quantized if "layers." in name and source[name].dim() > 1 and linear_of(name) is None]:
        parser.error(f"--model: {unnamed[0]} is none of {', '.join((*ATTENTION, *MLP))}, which rows are made of")
    items = passages(AutoTokenizer.from_pretrained(args.model), args.limit)
    print("| quantized | found | nats |\n|---|---:|---:|")
    for row, wanted in rows.items():
        if args.only and row not in args.only:
            continue
        state = dict(source)
        for name, value in quantized.items():
            place = linear_of(name)
            # Norms and the head go with all linears: training moves them together.
            if wanted(*place) if place else row == "all":
                state[name] = value
        model.load_state_dict(state)
        found, nats = measured(model, items)
        print(f"| {row} | {mean(found)} | {mean(nats)} |", flush=True)


if __name__ == "__main__":
    main()
