#!/usr/bin/env python3
"""How much of the energy between a model's blocks is that of one channel, and how many times the median channel's it is.

    python scripts/channels.py --recipe recipes/gemma3-270m.yaml

On eight sequences of the recipe's training text, massive tokens left out, in full precision. Where the largest channel has most
of the energy, a block's error is that channel's, and `distill.channel_cap` leaves more of the fit to the others.
"""

import argparse
from pathlib import Path

import torch

from lbllm_cli.pipeline.metrics import massive_tokens
from lbllm_cli.pipeline.plan import prepare
from lbllm_cli.recipe.load import load_recipe
from lbllm_cli.recipe.stages import STAGES

SEQUENCES = 8


@torch.no_grad()
def main() -> None:
    """Prints a line for each block, and the range over all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="recipe keys")
    arguments = parser.parse_args()
    spec = STAGES["distill"]
    plan = prepare(load_recipe(arguments.recipe, arguments.overrides), stages=(spec,))
    tokens, model, found = plan.stage_tokens(spec)[:SEQUENCES], plan.model, []
    hidden = model.embed()(tokens.to(model.device))
    for index in range(model.blocks):
        hidden = model.block(index)(hidden)
        energy = hidden[~massive_tokens(hidden)].float().square().sum(0)
        found.append((float(energy.max() / energy.sum()), float(energy.max() / energy.median())))
        print(f"block {index:3d}  share {found[-1][0]:.3f}  times the median {found[-1][1]:12,.0f}", flush=True)
    shares, times = zip(*found, strict=True)
    print(f"share {min(shares):.3f} to {max(shares):.3f}, times the median {min(times):,.0f} to {max(times):,.0f}")


if __name__ == "__main__":
    main()
