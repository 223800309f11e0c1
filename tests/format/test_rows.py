"""Embedding and head in 8 bits."""

import pytest
import torch

from lbllm_cli.format import rows
from lbllm_cli.format.rows import dequantize_rows, quantize_rows


def table(count=40, width=24) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(3)) * torch.logspace(-3, 2, count).unsqueeze(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_is_half_a_step_off_at_most_and_the_largest_is_127(dtype):
    weight = table().to(dtype)
    codes, scale = quantize_rows(weight)
    assert (codes.dtype, scale.dtype) == (torch.int8, torch.float16)
    assert (codes.abs().amax(1) == 127).all()
    # The scale's own rounding, 2^-11, shows in the largest values; a subnormal one has fewer digits.
    allowed = scale.float().unsqueeze(1) * (0.5 + 127 * 2.0**-10)
    assert ((dequantize_rows(codes, scale, torch.float32) - weight.float()).abs() <= allowed).all()


def test_what_lies_on_the_grid_comes_back_exactly():
    codes, scale = quantize_rows(table())
    values = dequantize_rows(codes, scale, torch.float32)
    again, same = quantize_rows(values)
    assert torch.equal(again, codes)
    assert torch.equal(same, scale)


def test_by_hand_and_a_row_of_zeros():
    codes, scale = quantize_rows(torch.tensor([[0.5, -1.27, 0.004], [0.0, 0.0, 0.0]]))
    assert codes.tolist() == [[50, -127, 0], [0, 0, 0]]
    assert scale[1] == 0
    assert dequantize_rows(codes, scale, torch.float32)[1].tolist() == [0, 0, 0]


def test_pieces_change_nothing(monkeypatch):
    whole = quantize_rows(table())
    monkeypatch.setattr(rows, "_PIECE", 50)
    assert all(map(torch.equal, quantize_rows(table()), whole))
    assert torch.equal(dequantize_rows(*whole, torch.bfloat16), dequantize_rows(*quantize_rows(table()), torch.bfloat16))


@pytest.mark.parametrize("value", [1e9, float("inf"), float("nan")])
def test_rows_without_a_scale_are_refused(value):
    with pytest.raises(ValueError, match="a row has values"):
        quantize_rows(torch.tensor([[1.0, 2.0], [value, 1.0]]))
