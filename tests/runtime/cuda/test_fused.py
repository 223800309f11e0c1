"""What lies between two products of a decode step, against transformers' modules and the format's quantizer."""

import pytest
import torch
from packed_toys import KNEE, UNIFORM
from torch.nn.functional import silu
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lbllm_cli.format.activations import Tables, places, quantize, split_groups
from lbllm_cli.runtime.cuda.activations import QuantizerTables
from lbllm_cli.runtime.cuda.fused import gate_and_quantize, norm, norm_and_quantize, shape

FORMS = {"knee": KNEE, "uniform": UNIFORM}
# width, values that share a step, dtype
CASES = [(80, 32, torch.float32), (80, 96, torch.bfloat16), (200, 64, torch.float16), (130, 128, torch.bfloat16)]


def prepared(device: torch.device, tables: Tables) -> QuantizerTables:
    zero = None if tables.zero is None else tables.zero.to(device)
    return QuantizerTables.of(Tables(tables.levels.to(device), zero, tables.clip.to(device)))


def random(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(rows, width, generator=torch.Generator().manual_seed(width)) ** 3).to(dtype)


def outputs(device: torch.device, rows: int, width: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For T - Z and steps, filled with what must not stay."""
    padded = -(-width // size) * size
    found = torch.full((rows, padded), 99, dtype=torch.int8, device=device)
    return found, torch.full((rows, 1 if size >= width else padded // size), torch.nan, device=device)


def check(found: torch.Tensor, step: torch.Tensor, values: torch.Tensor, tables: Tables, size: int) -> None:
    """That both are those of `values` [rows, width]."""
    width = values.shape[1]
    codes = quantize(split_groups(values, size), tables)
    lattice = (places(codes, tables.levels).int() - codes.zero.int().unsqueeze(-1)).flatten(1)
    assert torch.equal(found[:, :width].cpu().int(), lattice[:, :width])
    assert not found[:, width:].any()
    # The order of a sum: measured 2.1e-7.
    torch.testing.assert_close(step.cpu(), codes.step, rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("width", "size", "dtype"), CASES)
def test_a_norm_is_quantized(device, form, width, size, dtype):
    module = LlamaRMSNorm(width, 1e-5).to(dtype)
    module.weight.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(1))
    x = random(3, width, dtype)
    wanted, weight = module(x).detach(), module.weight.detach().to(device)
    found, step = outputs(device, 3, width, size)
    norm_and_quantize(x.to(device), weight, 1e-5, prepared(device, FORMS[form]), size, found, step)
    check(found, step, wanted, FORMS[form], size)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("width", "size", "dtype"), CASES)
def test_a_gate_is_quantized(device, form, width, size, dtype):
    x = random(3, 2 * width, dtype)
    x[0, :4] = torch.tensor([-200.0, 200.0, 0.0, -0.0])
    wanted = silu(x[:, :width]) * x[:, width:]
    found, step = outputs(device, 3, width, size)
    gate_and_quantize(x.to(device), prepared(device, FORMS[form]), size, found, step)
    check(found, step, wanted, FORMS[form], size)


@pytest.mark.parametrize(("width", "dtype"), [(72, torch.float32), (1500, torch.bfloat16), (2100, torch.float16)])
def test_the_last_norm_is_transformers(device, width, dtype):
    module = LlamaRMSNorm(width, 1e-6).to(dtype)
    module.weight.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(1))
    x = random(2, width, dtype)
    out = torch.full_like(x, torch.nan, device=device)
    norm(x.to(device), module.weight.detach().to(device), 1e-6, out)
    # The order of a sum of squares: in 16 bits a value may fall to the neighbour, none did here.
    torch.testing.assert_close(out.cpu(), module(x).detach(), rtol=1e-6 if dtype == torch.float32 else 8e-3, atol=0)


def test_groups_are_shared_out_among_programs():
    assert shape(1, 4096, 4096, 128)[:2] == ((8, 1), 32)
    assert shape(3, 80, 96, 32)[:2] == ((1, 3), 3)
    assert shape(2, 11008, 11008, 11008)[:2] == ((1, 2), 1)
