#!/usr/bin/env python3
"""What it costs to quantize each unit of a model alone, linears that read one input, in groups of one size and of another.

    python scripts/unit_costs.py --model models/smollm2-135m --out runs/unit-costs.jsonl

Levels of 2 bits, fitted as in stage 1 with `rounds: 1`. The rest of the model stays as it is; the cost is KL to it, nats a token,
on one text of each style of `builtin:calibration` behind those that Hessians are of. The file has a line for each unit as it is
measured; a run that was stopped goes on. Printed are, for each kind of unit, the sums over all blocks in both sizes, and what the
larger one costs 10^9 weights. With `--bits 2.5` it prints `ptq.group_sizes` for so many bits a weight, the larger size where it
costs least alone. Through stage 1 that is not where it costs least: see docs/measurements.md.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from lbllm_cli.data.sources import STYLES, builtin_records
from lbllm_cli.format.group_sizes import linear_name
from lbllm_cli.format.weights import expected_bits
from lbllm_cli.ptq.fit import fit_matrix
from lbllm_cli.ptq.moments import InputMoments, inverse_factor
from lbllm_cli.recipe.schema import Ptq
from lbllm_cli.runtime.units import Unit, find_units

_LENGTH = 512


def windows(tokenizer: Any, count: int, skip: int, length: int) -> Tensor:
    """Sequences of every style: int64 [styles * count, length]."""
    rows = []
    for style in STYLES:
        # Of prose a token is about four characters.
        text = "\n\n".join(record["text"] for record in builtin_records("calibration", style))[: 16 * (skip + count) * _LENGTH]
        tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        rows += [tokens[start * _LENGTH :][:length] for start in range(skip, skip + count)]
    return torch.stack(rows)


class Costs:
    """A model in full precision, what its blocks read, and its predictions. rows: int64 [sequences, length]."""

    def __init__(self, model: nn.Module, calibration: Tensor, rows: Tensor):
        decoder: Any = model.get_decoder()  # type: ignore[operator]
        self.model, self.layers = model, decoder.layers
        names = [name for name, module in self.layers[0].named_modules() if isinstance(module, nn.Linear)]
        with torch.device("meta"):
            self.units = find_units(type(model)(model.config).get_decoder(), names)  # type: ignore[operator]
        self.moments = {(block, unit): self._empty(block, unit) for block in range(len(self.layers)) for unit in self.units}
        with self._inputs():
            for row in calibration:
                model(row[None], use_cache=False)
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        with self._blocks():
            self.teacher = model(rows, use_cache=False).logits.float().log_softmax(-1)

    def _empty(self, block: int, unit: Unit) -> InputMoments:
        return InputMoments.empty(self.layers[block].get_submodule(unit[0]).in_features, torch.device("cpu"), with_drift=False)

    @contextmanager
    def _inputs(self) -> Iterator[None]:
        """Meanwhile moments of all units' inputs are added up."""
        handles = [
            self.layers[block].get_submodule(unit[0]).register_forward_pre_hook(
                lambda _, inputs, found=found: found.add(inputs[0].flatten(0, -2))
            )
            for (block, unit), found in self.moments.items()
        ]  # fmt: skip
        yield
        for handle in handles:
            handle.remove()

    @contextmanager
    def _blocks(self) -> Iterator[None]:
        """Meanwhile it is kept how each block is called."""

        def keep(_: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
            self.calls.append((inputs, {name: value for name, value in options.items() if name != "past_key_values"}))

        handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in self.layers]
        yield
        for handle in handles:
            handle.remove()

    def divergence(self, block: int) -> float:
        """KL of the model as it is now, of which blocks before `block` are unchanged."""
        (hidden, *others), _ = self.calls[block]
        for layer, (_, options) in zip(self.layers[block:], self.calls[block:], strict=True):
            out = layer(hidden, *others, **options)
            hidden = out[0] if isinstance(out, tuple) else out
        its: Any = self.model
        found = its.lm_head(its.get_decoder().norm(hidden)).float().log_softmax(-1)
        return float((self.teacher.exp() * (self.teacher - found)).sum(-1).mean())

    def of_unit(self, block: int, unit: Unit, sizes: list[int]) -> dict[str, float]:
        """KL with one unit alone quantized, by the size of its groups."""
        linears = [self.layers[block].get_submodule(name) for name in unit]
        source = torch.cat([linear.weight for linear in linears]).clone()
        settings = Ptq(group_size=min(sizes), level_bits=2)
        hessian, factor, _ = inverse_factor(self.moments[block, unit].mean_hessian(), settings.damping)
        found = {}
        for size in sizes:
            self._put(linears, fit_matrix(source, hessian, factor, settings, size).values())
            found[str(size)] = self.divergence(block)
        self._put(linears, source)
        return found

    @staticmethod
    def _put(linears: list[nn.Module], values: Tensor) -> None:
        rows = [len(linear.weight) for linear in linears]  # type: ignore[arg-type]
        for linear, part in zip(linears, values.split(rows), strict=True):
            linear.weight.copy_(part)  # type: ignore[operator]


def _weights(row: dict[str, Any]) -> int:
    return int(row["rows"] * row["width"])


def allocated(found: list[dict[str, Any]], sizes: list[int], bits: float) -> dict[str, int]:
    """Linears that get the larger groups, for at most `bits` a weight: of units in turn that which costs each weight least.

    Raises SystemExit where larger groups everywhere are not enough.
    """

    def stored(row: dict[str, Any], size: int) -> float:
        return expected_bits([(row["rows"], row["width"])], size, 2) * _weights(row)

    small, large = sizes
    left = sum(stored(row, small) for row in found) - bits * sum(map(_weights, found))
    chosen: dict[str, int] = {}
    for row in sorted(found, key=lambda row: (row["kl"][str(large)] - row["kl"][str(small)]) / _weights(row)):
        if left <= 0:
            break
        left -= stored(row, small) - stored(row, large)
        chosen |= {linear_name(row["block"], name): large for name in row["unit"].split(", ")}
    if left > 0:
        raise SystemExit(f"groups of {large} everywhere are more than {bits:g} bits a weight; give larger --sizes or more --bits")
    return chosen


def table(found: list[dict[str, Any]], sizes: list[int]) -> list[str]:
    """Lines of sums by kind of unit, and what the larger groups cost each 10^9 weights."""
    lines = []
    for unit in dict.fromkeys(row["unit"] for row in found):
        rows = [row for row in found if row["unit"] == unit]
        sums = [sum(row["kl"][str(size)] for row in rows) for size in sizes]
        each = (sums[-1] - sums[0]) / sum(map(_weights, rows)) * 1e9
        lines.append(f"{unit:<48}" + "".join(f"{value:9.4f}" for value in sums) + f"{each:9.2f}")
    return lines


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="KL of each unit quantized alone.")
    parser.add_argument("--model", type=Path, required=True, help="folder of the full-precision model")
    parser.add_argument("--out", type=Path, required=True, help="file of results; a run that was stopped goes on")
    parser.add_argument("--sizes", type=int, nargs=2, default=[16, 32], help="group sizes (default: 16 32)")
    parser.add_argument("--sequences", type=int, default=6, help="of 512 tokens a style that Hessians are of (default: 6)")
    parser.add_argument("--length", type=int, default=320, help="tokens of a style that KL is measured on (default: 320)")
    parser.add_argument("--bits", type=float, help="of a weight: print which linears are to have larger groups for so many")
    args = parser.parse_args(argv)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    if getattr(model.config, "final_logit_softcapping", None):
        raise SystemExit(f"{args.model} caps its logits, which this does not")
    if any(name.endswith("experts") for name, _ in model.get_decoder().layers[0].named_modules()):
        raise SystemExit(f"{args.model} is a mixture of experts, of which this does not measure experts")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    costs = Costs(
        model, windows(tokenizer, args.sequences, 0, _LENGTH), windows(tokenizer, 1, args.sequences, args.length)
    )
    sizes = sorted(args.sizes)
    asked = {"sizes": sizes, "sequences": args.sequences, "length": args.length}
    found = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    if any(row["asked"] != asked for row in found):
        raise SystemExit(f"{args.out} has results of other settings; give another --out")
    done = {(row["block"], row["unit"]) for row in found}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("a") as file:
        for block, unit in costs.moments:
            name = ", ".join(unit)
            if (block, name) in done:
                continue
            rows = sum(len(costs.layers[block].get_submodule(linear).weight) for linear in unit)
            width = costs.layers[block].get_submodule(unit[0]).in_features
            kl = costs.of_unit(block, unit, sizes)
            row = {"block": block, "unit": name, "rows": rows, "width": width, "kl": kl, "asked": asked}
            print(json.dumps(row), file=file, flush=True)
            found.append(row)
    print(*table(found, sizes), sep="\n")
    if args.bits is not None:
        section = {"group_size": sizes[0], "level_bits": 2, "group_sizes": allocated(found, sizes, args.bits)}
        print(yaml.safe_dump({"ptq": section}, sort_keys=False), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
