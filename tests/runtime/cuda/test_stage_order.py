"""Levels in order, against torch's sort."""

import torch

from lbllm_cli.runtime.cuda.stage.kernels import TritonKernels


def test_levels_are_sorted_in_place(device):
    levels = torch.randn(7, 40, 4, generator=torch.Generator().manual_seed(0)).to(device)
    levels[0, 0] = torch.tensor([3.0, 3.0, -1.0, 3.0])
    expected = levels.sort(dim=-1).values
    TritonKernels().sort_levels(levels)
    assert torch.equal(levels, expected)
