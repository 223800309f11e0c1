"""Single instructions, in whichever form runs here, against what torch and Python compute."""

import torch
import triton
import triton.language as tl

from lbllm_cli.runtime.cuda.instructions import dot4, look_up, nearest_integer, product, rounded_to


@triton.jit
def _bytes(selector, table, other, found, dots, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    picked = look_up(tl.load(selector + at), tl.load(table + at))
    tl.store(found + at, picked)
    tl.store(dots + at, dot4(picked, tl.load(other + at), at))


def test_bytes_are_looked_up_and_multiplied(device):
    g = torch.Generator().manual_seed(0)
    selector, table, other = (torch.randint(-(2**31), 2**31, (64,), generator=g).int() for _ in range(3))
    selector &= 0x33333333
    levels, codes = table.view(torch.int8).view(64, 4), torch.stack([(selector >> (4 * i)) & 3 for i in range(4)], 1)
    wanted = levels.gather(1, codes.long())
    found, dots = (torch.empty(64, dtype=torch.int32, device=device) for _ in range(2))
    _bytes[(1,)](selector.to(device), table.to(device), other.to(device), found, dots, SIZE=64)
    assert torch.equal(found.cpu().view(torch.int8).view(64, 4), wanted)
    sums = (wanted.int() * other.view(torch.int8).view(64, 4).int()).sum(1)
    assert torch.equal(dots.cpu(), (sums + torch.arange(64)).int())


@triton.jit
def _rounded(x, y, whole, short, half, products, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    value = tl.load(x + at)
    tl.store(whole + at, nearest_integer(value))
    tl.store(short + at, rounded_to(value, tl.bfloat16))
    tl.store(half + at, rounded_to(value, tl.float16))
    tl.store(products + at, product(value, tl.load(y + at)) - value)


def test_ties_go_to_the_even_number(device):
    g = torch.Generator().manual_seed(1)
    x = torch.cat([torch.randn(32, generator=g) * 300, torch.arange(-16, 16) + 0.5])
    # Halfway between two of bfloat16.
    x[:16] = 1 + (2 * torch.arange(16) + 1) / 256
    y = torch.randn(64, generator=g)
    whole = torch.empty(64, dtype=torch.int32, device=device)
    short, half = (torch.empty(64, dtype=dtype, device=device) for dtype in (torch.bfloat16, torch.float16))
    products = torch.empty(64, device=device)
    _rounded[(1,)](x.to(device), y.to(device), whole, short, half, products, SIZE=64)
    assert torch.equal(whole.cpu(), x.round().int())
    assert torch.equal(short.cpu(), x.bfloat16())
    assert torch.equal(half.cpu(), x.half())
    assert torch.equal(products.cpu(), x * y - x)


def test_what_is_no_number_stays_none(device):
    x = torch.full((64,), torch.nan, device=device)
    x[1], x[2] = torch.inf, -torch.inf
    found = [torch.empty(64, dtype=dtype, device=device) for dtype in (torch.int32, torch.bfloat16, torch.float16, torch.float32)]
    _rounded[(1,)](x, x, *found, SIZE=64)
    for kept in found[1:3]:
        assert kept[0].isnan()
        assert kept[1:3].tolist() == [torch.inf, -torch.inf]
