"""The head's kernel against a product in float64."""

import pytest
import torch

from lbllm_cli.runtime.cuda.head import head_logits, tile


@pytest.mark.parametrize(
    ("rows", "outs", "width", "dtype", "kept"),
    [
        (1, 19, 80, torch.bfloat16, torch.bfloat16),
        (2, 9, 1100, torch.bfloat16, torch.float32),
        (3, 10, 64, torch.float16, torch.float16),
        (8, 3, 130, torch.float32, torch.float32),
    ],
)
def test_the_head_is_a_product(device, rows, outs, width, dtype, kept):
    g = torch.Generator().manual_seed(width)
    weight, x = torch.randn(outs, width, generator=g).to(dtype), torch.randn(rows, width, generator=g).to(kept)
    out = torch.full((rows, outs), torch.nan, dtype=kept, device=device)
    head_logits(weight.to(device), x.to(device), out)
    wanted, terms = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    error = (out.cpu().double() - wanted).abs()
    if kept != torch.float32:
        error = (error - wanted.abs() * torch.finfo(kept).eps / 2).clamp(min=0)
    assert float((error / terms).nan_to_num(torch.inf).max()) < 2e-7  # measured 3.7e-8


def test_tiles():
    found = [
        tuple(tile(*shape)[key] for key in ("ROWS", "OUTS", "BLOCK", "num_warps")) for shape in ((1, 4096), (5, 576), (3, 80))
    ]
    assert found == [(1, 8, 1024, 4), (8, 1, 1024, 4), (4, 2, 128, 1)]
