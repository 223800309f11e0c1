"""Shapes of knee quantizers."""

import torch

import lbllm_cli.hf  # noqa: F401 - packed folders
from lbllm_cli.training.knees import Shape


def test_shapes_are_found_again_in_their_levels():
    generator = torch.Generator().manual_seed(0)
    tried = 0
    for _ in range(2000):
        fine_low, fine_high, coarse_low, coarse_high = torch.randint(0, 6, (4,), generator=generator).tolist()
        ratios = torch.randint(2, 8, (2,), generator=generator).tolist()
        # Of a side without coarse levels no ratio is left to be seen.
        shape = Shape(
            fine_low, fine_high, coarse_low, coarse_high, ratios[0] if coarse_low else 1, ratios[1] if coarse_high else 1
        )
        if shape.valid():
            assert Shape.of(shape.levels(), shape.zero) == shape
            tried += 1
    assert tried > 1000
