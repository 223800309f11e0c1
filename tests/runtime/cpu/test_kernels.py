"""The compiled kernels against the formats' definitions in float64: linears, quantizer, head, repacking."""

import copy
import pickle
import random

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from lbllm_cli.engine.location import library_path
from lbllm_cli.format.activations import Tables, dequantize, places, quantize, split_groups, stored_clip, uniform_levels
from lbllm_cli.format.weights import PackedWeight, group_count, pack_codes
from lbllm_cli.runtime.backend import backend_of
from lbllm_cli.runtime.cpu.head import ROWS_MAX, HeadLinear
from lbllm_cli.runtime.cpu.library import DTYPES, pointer, quantizer_struct
from lbllm_cli.runtime.cpu.quantizer import native_gradients
from lbllm_cli.runtime.cpu.unit import Unit, usable
from lbllm_cli.runtime.linear import PackedLinear
from lbllm_cli.runtime.quantizer import ActQuantizer
from lbllm_cli.runtime.torch.quantizer import gradients
from lbllm_cli.training.knees import Shape, tables_of

if library_path() is None:
    pytest.skip("this installation has no compiled kernels", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("restored")
SMALL, MIDDLE, LARGE = Shape(5, 6, 2, 2, 3, 3), Shape(3, 4, 4, 4, 5, 6), Shape(3, 4, 4, 4, 13, 17)  # tops 23, 51, 127
FORMS = {
    "one table to 31": tables_of([SMALL]),
    "two tables to 63": tables_of([SMALL, MIDDLE]),
    "two tables to 127": tables_of([LARGE, SMALL]),
    "one table, clipped": tables_of([MIDDLE])._replace(clip=torch.tensor([[0.9, 0.8]])),
    "uniform of 4 bits": Tables(uniform_levels(4), None, torch.ones(1, 2)),
    "uniform of 6 bits": Tables(uniform_levels(6), None, torch.ones(1, 2)),
    "uniform of 7 bits": Tables(uniform_levels(7), None, torch.tensor([[0.95, 0.9]])),
}
# in_features, out_features, group_size, level_bits, inputs that share a step
SHAPES = [
    (100, 7, 48, 8, 48), (200, 21, 64, 8, 64), (576, 10, 128, 8, 128), (96, 8, 16, 8, 16), (384, 13, 192, 8, 192),
    (300, 9, 256, 8, 256), (224, 17, 96, 8, 96), (33, 3, 32, 8, 32), (200, 9, 16, 2, 64), (300, 17, 32, 2, 128),
    (100, 5, 16, 2, 48), (384, 8, 64, 2, 256), (576, 11, 128, 2, 64), (350, 3, 48, 2, 16),
    (212, 9, 16, 2, 32), (96, 17, 32, 2, 32),
]  # fmt: skip


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def packed(inn: int, out: int, size: int, bias: bool = False, seed: int = 0, bits: int = 8) -> PackedLinear:
    """A packed linear with random contents, as a checkpoint may have them."""
    g, layer = seeded(seed), PackedLinear(inn, out, size, bias, bits)
    layer.weight.copy_(pack_codes(torch.randint(0, 4, (out, inn), generator=g, dtype=torch.uint8), size))
    if bits == 8:
        layer.levels.copy_(torch.randint(-127, 128, layer.levels.shape, generator=g))
        layer.levels[torch.rand(layer.levels.shape, generator=g) < 0.2] = 127
    else:
        layer.levels.copy_(torch.randint(0, 256, layer.levels.shape, generator=g))
    layer.scale.copy_(torch.rand(layer.scale.shape, generator=g) * 0.02 + 1e-3)
    layer.scale[0] = 3 * 2.0**-24  # subnormal
    if bias:
        layer.bias.data.copy_(torch.randn(out, generator=g))
    return layer


def quantized_groups(x, tables, step_dtype=torch.float32):
    return backend_of(x.device).quantized(x, tables, step_dtype)


def _parts(layer):
    held = layer.packed()
    return held.codes, held.levels, held.scale


def quantized(lib, x: torch.Tensor, quantizer: ActQuantizer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lattice places [rows, width], steps and zeros [rows, groups] of the library's quantizer."""
    rows, width = x.shape
    groups = group_count(width, min(quantizer.size, width))
    found = torch.empty(rows, width, dtype=torch.uint8), torch.empty(rows, groups), torch.empty(rows, groups, dtype=torch.int32)
    tables = torch.empty(rows, groups, dtype=torch.int32)
    struct, sizes = quantizer_struct(quantizer.tables, quantizer.size), (DTYPES[x.dtype], rows, width)
    lattice, *others = map(pointer, (*found, tables))
    lib.lbllm_quantize(struct, pointer(x), *sizes, lattice, None, *others, 0, 1)
    return found


def values(lib, x: torch.Tensor, quantizer: ActQuantizer) -> torch.Tensor:
    """d * (T - Z), float64 [rows, width]."""
    lattice, steps, zeros = quantized(lib, x, quantizer)
    size, width = min(quantizer.size, x.shape[1]), x.shape[1]
    step, zero = (part.double().repeat_interleave(size, 1)[:, :width] for part in (steps, zeros))
    return step * (lattice.double() - zero)


def off(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> float:
    """Largest error of `found` against float64, relative to the sum of the sizes of the terms."""
    wanted = x @ weight.double().T
    terms = x.abs() @ weight.double().abs().T
    if bias is not None:
        wanted, terms = wanted + bias.double(), terms + bias.double().abs()
    difference = (found.double() - wanted).abs()
    if found.dtype == torch.bfloat16:
        difference = (difference - wanted.abs() / 256).clamp(min=0)
    return float((difference / terms.clamp(min=1e-30)).max())


TOLERANCE = 3e-7  # measured 9e-8 at most over all tests of linears


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("per", ["group", "token"])
def test_a_linear_is_its_decoded_weights_times_quantized_inputs(lib, form, per):
    worst = 0.0
    for number, (inn, out, size, bits, step) in enumerate(SHAPES):
        layer = packed(inn, out, size, bias=number % 2 == 1, seed=number, bits=bits)
        weight = layer.dense_weight()
        quantizer = ActQuantizer(FORMS[form], step if per == "group" else inn + number % 2)
        assert usable([layer], quantizer)
        unit = Unit([layer], quantizer)
        for rows in (1, 3, 4, 37):
            x = torch.randn(rows, inn, generator=seeded(rows)) * 10.0 ** (number % 8 - 4)
            for dtype in DTYPES:
                y = unit.run(x.to(dtype))
                assert y.dtype == dtype
                worst = max(worst, off(y, values(lib, x.to(dtype), quantizer), weight, unit.bias))
    assert worst < TOLERANCE


def test_many_rows_and_threads(lib):
    layer = packed(576, 260, 128)
    weight, quantizer = layer.dense_weight(), ActQuantizer(FORMS["two tables to 63"], 128)
    unit = Unit([layer], quantizer)
    x = torch.randn(300, 576, generator=seeded(1))
    assert off(unit.run(x), values(lib, x, quantizer), weight, None) < TOLERANCE


def test_several_linears_of_one_input_are_one_call(lib):
    layers = [packed(200, out, 64, bias=out == 5, seed=out) for out in (13, 5, 30)]
    weight, quantizer = torch.cat([layer.dense_weight() for layer in layers]), ActQuantizer(FORMS["two tables to 127"], 64)
    bias = torch.cat([torch.zeros(13), layers[1].bias, torch.zeros(30)])
    Unit(layers, quantizer)
    x = torch.randn(2, 3, 200, generator=seeded(1))
    y = torch.cat([layer(x) for layer in layers], -1)
    assert y.shape == (2, 3, 48)
    assert off(y.view(6, 48), values(lib, x.view(6, 200), quantizer), weight, bias) < TOLERANCE
    # Another input gives another output: what is kept for the others of a unit belongs to one tensor.
    other = x + 1
    assert not torch.equal(layers[0](other), y[..., :13])
    found, inputs = layers[2](other).view(6, 30), values(lib, other.view(6, 200), quantizer)
    assert off(found, inputs, layers[2].dense_weight(), None) < TOLERANCE


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_quantizes_as_torch_does(lib, form, dtype):
    """Values but for groups whose candidates are equally good, gradients of inputs to the bit, sums to their rounding."""
    for number, (shape, size) in enumerate([((3, 70, 9), 64), ((5, 2, 33), 24), ((2, 130, 1), 100), ((1, 1, 7), 16)]):
        x = (torch.randn(*shape, size, generator=seeded(number)) * 10.0 ** (3 * number - 4)).to(dtype)
        x[0, 0, 0] = 0
        tables = FORMS[form]._replace(clip=FORMS[form].clip * 0.8)
        for step_dtype in DTYPES:
            found, codes = quantized_groups(x, tables, step_dtype), quantize(x, tables, step_dtype)
            apart = (found.step - codes.step).abs() > (1e-6 if step_dtype == torch.float32 else 8e-3) * codes.step
            assert float((apart | (found.table != codes.table) | (found.zero != codes.zero)).float().mean()) < 2e-3  # measured 0
            lattice = (found.values / found.step.clamp(min=1e-30).unsqueeze(-1)).round()
            expected = places(codes, tables.levels).float() - codes.zero.float().unsqueeze(-1)
            assert float((lattice != expected * (found.step != 0).unsqueeze(-1)).float().mean()) < 2e-3  # measured 0
            upstream = torch.randn(x.shape, generator=seeded(number + 9))
            mine, wanted = (
                native_gradients(x, tables, found, upstream, (True, True)),
                gradients(x, tables, found, upstream, (True, True)),
            )
            assert mine is not None
            assert torch.equal(mine[0], wanted[0])
            assert 0 < float((mine[0] == 0).float().mean()) < 0.5
            torch.testing.assert_close(mine[1], wanted[1], rtol=1e-5, atol=1e-6 * float(wanted[1].abs().max()))  # measured 2e-7
            assert native_gradients(x, tables, found, upstream, (False, True))[0] is None
            assert native_gradients(x, tables, found, upstream, (True, False))[1] is None


def test_what_the_library_does_not_quantize_torch_does(lib, choose):
    x, eight = torch.randn(4, 64, generator=seeded(1)), Tables(uniform_levels(8), None, torch.ones(1, 2))
    assert native_gradients(x, eight, quantized_groups(x, eight), x, (True, True)) is None
    two = FORMS["two tables to 63"]
    # Other layouts and dtypes are brought into a form that it reads.
    assert torch.equal(quantized_groups(x.T.contiguous().T, two).values, quantized_groups(x, two).values)
    assert torch.equal(quantized_groups(x.half(), two).values, quantized_groups(x.half().float(), two).values)
    choose("off")
    for tables in (eight, two):
        assert torch.equal(quantized_groups(x, tables).values, dequantize(quantize(x, tables), tables.levels))
    assert native_gradients(x, two, quantized_groups(x, two), x, (True, True)) is None


@pytest.mark.parametrize("form", FORMS)
def test_no_sum_saturates(lib, form):
    """All levels and all inputs as large as they can be: exact integers, times powers of two."""
    quantizer = ActQuantizer(FORMS[form]._replace(clip=torch.ones(len(FORMS[form].clip), 2)), 256)
    for level in (127, -127):
        layer = PackedLinear(512, 9, 256, bias=False)
        layer.levels.fill_(level)
        layer.scale.fill_(0.25)
        unit = Unit([layer], quantizer)
        for value in (8.0, -8.0):
            for rows in (1, 5):
                x = torch.full((rows, 512), value)
                lattice, steps, zeros = quantized(lib, x, quantizer)
                if form.startswith("uniform"):
                    assert set(lattice.flatten().tolist()) == {int(quantizer.act_levels.max()) if value > 0 else 0}
                wanted = 512 * 0.25 * level * float(steps[0, 0]) * (int(lattice[0, 0]) - int(zeros[0, 0]))
                torch.testing.assert_close(unit.run(x), torch.full((rows, 9), wanted), rtol=2e-7, atol=0)
                assert wanted == pytest.approx(512 * 0.25 * level * value, rel=1e-6)


def test_inputs_in_full_precision(lib):
    for number, (inn, out, size, bits, _) in enumerate(SHAPES):
        layer = packed(inn, out, size, bias=number % 2 == 1, seed=number, bits=bits)
        weight = layer.dense_weight()
        assert usable([layer], None)
        unit = Unit([layer], None)
        for rows in (1, 3, 4, 37, 130):
            x = torch.randn(rows, inn, generator=seeded(rows)) * 10.0 ** (number % 8 - 4)
            for dtype in DTYPES:
                y = unit.run(x.to(dtype))
                assert y.dtype == dtype
                assert off(y, x.to(dtype).double(), weight, unit.bias) < TOLERANCE  # measured 7.3e-8
                assert torch.equal(unit.run(x[1:3].to(dtype)), y[1:3])
        assert torch.equal(layer(x), unit.run(x))


@pytest.mark.parametrize("form", ["two tables to 127", "uniform of 4 bits"])
def test_zeros_give_the_bias_and_what_is_not_finite_stays_in_its_row(lib, form):
    layer = packed(200, 11, 64, bias=True)
    unit = Unit([layer], ActQuantizer(FORMS[form], 64))
    x = torch.randn(6, 200, generator=seeded(0))
    expected = unit.run(x)
    assert torch.equal(unit.run(torch.zeros(5, 200)), unit.bias.expand(5, 11))
    # So small that their step has no finite reciprocal: zeros too.
    assert torch.equal(unit.run(torch.full((5, 200), 1e-35)), unit.bias.expand(5, 11))
    for bad in (torch.inf, -torch.inf, torch.nan):
        spoiled = x.clone()
        spoiled[2, 70] = bad
        y = unit.run(spoiled)
        assert not bool(torch.isfinite(y[2]).any())
        assert torch.equal(y[[0, 1, 3, 4, 5]], expected[[0, 1, 3, 4, 5]])
    assert not bool(torch.isfinite(unit.run(torch.full((1, 200), torch.inf))).any())


@pytest.mark.parametrize("per", ["group", "token"])
def test_a_row_depends_neither_on_other_rows_nor_on_threads(lib, per):
    layer = packed(576, 260, 128, bias=True)
    unit = Unit([layer], ActQuantizer(FORMS["two tables to 63"], 128 if per == "group" else 576))
    x = torch.randn(133, 576, generator=seeded(0))
    whole = unit.run(x)
    for first, count in ((0, 1), (1, 2), (3, 3), (6, 4), (10, 5), (20, 64), (128, 5)):
        assert torch.equal(unit.run(x[first : first + count]), whole[first : first + count])
    weights, quantizer = unit.structs
    for threads in (2, 3, 5):
        y = torch.empty_like(whole)
        lib.lbllm_linear(weights, quantizer, pointer(x), pointer(y), 0, 133, threads)
        assert torch.equal(y, whole)


def test_random_shapes(lib):
    """Two hundred cases: shapes, group sizes, contents, forms, granularities, dtypes."""
    draw, worst = random.Random(5), 0.0
    for case in range(200):
        size = draw.choice([16, 20, 32, 48, 64, 96, 100, 128, 192, 256])
        inn, out, rows = draw.randint(1, 400), draw.randint(1, 40), draw.choice([1, 2, 3, 4, 5, 8, 9])
        bits = 2 if size % 16 == 0 and draw.random() < 0.5 else 8
        layer = packed(inn, out, size, bias=draw.random() < 0.3, seed=case, bits=bits)
        group = size if bits == 8 else draw.choice([16, 32, 64, 128, 240])
        quantizer = ActQuantizer(draw.choice(list(FORMS.values())), draw.choice([group, inn, max(inn, 500)]))
        weight = layer.dense_weight()
        if not usable([layer], quantizer):
            continue
        unit = Unit([layer], quantizer)
        x = (torch.randn(rows, inn, generator=seeded(case)) * 10.0 ** draw.randint(-6, 6)).to(draw.choice(list(DTYPES)))
        # A few outliers, as activations have them.
        x[torch.rand(x.shape, generator=seeded(case)) < 0.02] *= 30
        worst = max(worst, off(unit.run(x), values(lib, x, quantizer), weight, unit.bias))
    assert worst < TOLERANCE


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_quantizer_is_that_of_ops_actquant(lib, form, dtype):
    differing = total = 0
    for width, size in ((576, 128), (100, 48), (200, 64), (80, 16), (300, 256), (250, 250), (40, 64)):
        quantizer = ActQuantizer(FORMS[form], size)
        x = torch.randn(60, width, generator=seeded(width)).to(dtype)
        x[:, ::17] *= 8
        x[3] = 0
        lattice, steps, zeros = quantized(lib, x, quantizer)
        groups = split_groups(x.float(), min(size, width))
        codes = quantize(groups, quantizer.tables)
        wanted, found = places(codes, quantizer.act_levels), split_groups(lattice, min(size, width))
        if width % size and width > size:
            found[:, -1, width % size :] = wanted[:, -1, width % size :]
        same = (found == wanted).all(-1) & (zeros == codes.zero)
        torch.testing.assert_close(steps[same], codes.step[same], rtol=1e-6, atol=0)  # measured 3.3e-7
        # Else two candidates, or two codes of one value, were as good as each other.
        mine, theirs = (
            (groups.double() - step.double().unsqueeze(-1) * (place.double() - zero.double().unsqueeze(-1))).square().sum(-1)
            for place, step, zero in ((found, steps, zeros), (wanted, codes.step, codes.zero))
        )
        torch.testing.assert_close(mine[~same], theirs[~same], rtol=1e-5, atol=0)
        differing, total = differing + int((~same).sum()), total + same.numel()
    assert differing <= 0.01 * total  # measured 0


def test_packing_is_undone_bit_for_bit(lib):
    for inn, _, size, bits, step in SHAPES:
        layers = [packed(inn, out, size, seed=out, bits=bits) for out in (13, 1, 8, 30)]
        before = [[part.clone() for part in _parts(layer)] for layer in layers]
        states = [layer.state_dict() for layer in layers]
        unit = Unit(layers, ActQuantizer(FORMS["uniform of 4 bits"], step))
        assert unit.tiles.data_ptr() % 64 == 0
        for layer, parts, state in zip(layers, before, states, strict=True):
            assert layer.weight is layer.levels is layer.scale is None
            for found, wanted in zip(_parts(layer), parts, strict=True):
                assert found.dtype == wanted.dtype
                assert torch.equal(found, wanted)
            now = layer.state_dict()
            assert list(now) == list(state)
            assert all(torch.equal(now[name], tensor) for name, tensor in state.items())
            assert torch.equal(layer.dense_weight(), PackedWeight(*parts, inn).values())


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to("cpu", torch.float64).float()])
def test_casts_copies_and_pickles_keep_the_weights(cast):
    layer = packed(200, 11, 64)
    before = [part.clone() for part in _parts(layer)]
    Unit([layer], ActQuantizer(FORMS["two tables to 63"], 64))
    x = torch.randn(3, 200, generator=seeded(0))
    expected = layer(x)
    model = cast(nn.Sequential(layer))
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other[0].unit is not None
        assert all(torch.equal(found, wanted) for found, wanted in zip(_parts(other[0]), before, strict=True))
        assert torch.equal(other[0](x), expected)
    twin = copy.deepcopy(model)
    twin[0].unit.tiles.zero_()
    assert torch.equal(model[0](x), expected)


def test_another_device_takes_codes_back():
    layer = packed(200, 11, 64, bias=True)
    Unit([layer], ActQuantizer(FORMS["two tables to 63"], 64))
    layer.to("meta")
    assert layer.unit is None
    assert {name: (tuple(value.shape), value.dtype) for name, value in layer.state_dict().items()} == {
        "weight": ((11, 4, 16), torch.uint8),
        "levels": ((11, 4, 4), torch.int8),
        "scale": ((11, 4), torch.float16),
        "bias": ((11,), torch.float32),
    }


def test_gradients_other_dtypes_and_switched_off_quantizers_are_those_of_torch():
    layer = packed(100, 7, 48, bias=True)
    weight, quantizer = layer.dense_weight(), ActQuantizer(FORMS["one table to 31"], 48)
    Unit([layer], quantizer)
    x = torch.randn(3, 100, generator=seeded(0))
    # float16 inputs go through float32.
    assert torch.equal(layer(x.half()), layer(x.half().float()).half())
    learnt = x.clone().requires_grad_()
    torch.testing.assert_close(layer(learnt), layer(x), rtol=1e-5, atol=1e-5)
    assert layer(x.double()).dtype == torch.float64
    layer(x)  # nothing of this pass must outlive the switch
    quantizer.enabled = False
    torch.testing.assert_close(layer(x), linear(x, weight, layer.bias), rtol=1e-5, atol=1e-5)
    learnt = x.clone().requires_grad_()
    layer(learnt).sum().backward()
    torch.testing.assert_close(learnt.grad, weight.sum(0).expand(3, 100))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@torch.no_grad()
def test_compiled_layers_give_the_same(backend):
    torch._dynamo.reset()
    layers = nn.ModuleList(packed(200, out, 64, seed=out) for out in (13, 5))
    Unit(list(layers), ActQuantizer(FORMS["two tables to 63"], 64))
    x = torch.randn(3, 200, generator=seeded(0))

    def together(x):
        return torch.cat([torch.relu(layer(x)) for layer in layers], -1)

    expected = together(x)
    assert torch.equal(torch.compile(together, backend=backend, fullgraph=True)(x), expected)
    assert torch.equal(torch.compile(layers[1], backend=backend)(x), layers[1](x))


def test_the_operator_is_registered_as_torch_wants_it():
    unit = Unit([packed(200, 13, 64)], ActQuantizer(FORMS["two tables to 63"], 64))
    x = torch.randn(2, 3, 200)
    torch.library.opcheck(torch.ops.lbllm.linear, (x, id(unit), 13), test_utils=("test_schema", "test_faketensor"))
    assert torch.equal(torch.ops.lbllm.linear(x, id(unit), 13), unit.run(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
@torch.no_grad()
def test_the_head_is_a_matrix_product(lib, dtype, stored):
    for inn, out in ((7, 3), (16, 9), (40, 33), (100, 5), (576, 70), (601, 4)):
        head = nn.Linear(inn, out, bias=False).to(stored)
        head.weight.copy_(torch.randn(out, inn, generator=seeded(inn)))
        head.__class__ = HeadLinear
        for rows in range(1, ROWS_MAX + 1):
            x = torch.randn(rows, inn, generator=seeded(rows)).to(dtype)
            y = head(x.view(rows, 1, inn))
            assert y.dtype == dtype
            assert y.shape == (rows, 1, out)
            assert off(y.view(rows, out), x.double(), head.weight, None) < 3e-7  # measured 9.4e-8


@torch.no_grad()
def test_a_head_of_another_kind_is_torchs():
    plain = nn.Linear(40, 6, bias=False).double()
    head = copy.deepcopy(plain)
    head.__class__ = HeadLinear
    x = torch.randn(2, 40).double()
    assert torch.equal(head(x), plain(x))
    many = torch.randn(ROWS_MAX + 1, 40).bfloat16()
    assert torch.equal(head.bfloat16()(many), plain.bfloat16()(many))
    with torch.enable_grad():
        learnt = many[:2].clone().requires_grad_()
        assert head(learnt).requires_grad
    # A transposed weight is not what the library reads.
    head.weight = nn.Parameter(head.weight.detach().T.contiguous().T)
    torch.testing.assert_close(head(many[:2]), plain(many[:2]))


def test_what_the_library_cannot_run_stays_in_torch():
    eight_bits = ActQuantizer(Tables(uniform_levels(8), None, torch.ones(1, 2)), 64)
    four_bits = FORMS["uniform of 4 bits"]
    assert not usable([packed(200, 5, 64)], eight_bits)
    assert not usable([packed(600, 5, 512)], ActQuantizer(four_bits, 512))
    assert not usable([packed(200, 5, 64)], ActQuantizer(four_bits, 32))
    assert usable([packed(200, 5, 64)], ActQuantizer(four_bits, 64))
    assert not usable([packed(200, 5, 16, bits=2)], ActQuantizer(four_bits, 40))
    assert not usable([packed(900, 5, 16, bits=2)], ActQuantizer(four_bits, 512))
    assert usable([packed(200, 5, 512, bits=2)], ActQuantizer(four_bits, 48))
    assert stored_clip(torch.ones(1)).dtype == torch.int32
