"""Records of new tokens, and attention over records, against `format.kv_record` and a plain softmax in float64."""

import pytest
import torch
from packed_toys import KNEE, UNIFORM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from lbllm_cli.format.activations import Tables, dequantize, quantize, split_groups
from lbllm_cli.format.kv_record import read_record, write_record
from lbllm_cli.runtime.cuda.activations import QuantizerTables
from lbllm_cli.runtime.cuda.attention import attend_records, join_and_quantize, parts_of
from lbllm_cli.runtime.cuda.records import RecordTables, append_records, recordable
from lbllm_cli.training.knees import Shape, tables_of

FORMS = {"two tables": KNEE, "one table": tables_of([Shape(5, 6, 2, 2, 3, 3)]), "uniform": UNIFORM}
# head_dim, values that share a step, heads, heads of keys
SHAPES = [(16, 16, 4, 2), (80, 32, 2, 2), (24, 24, 3, 1)]


def on(device: torch.device, tables: Tables) -> Tables:
    return Tables(tables.levels.to(device), None if tables.zero is None else tables.zero.to(device), tables.clip.to(device))


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) ** 3).to(dtype)


# Writing


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("number", "dtype"), [(0, torch.float32), (1, torch.bfloat16), (2, torch.float16)])
def test_a_new_token_is_written_as_the_format_has_it(device, form, number, dtype):
    width, size, heads, kv_heads = SHAPES[number]
    tables, rows, capacity, length = FORMS[form], 3, 5, 3
    qkv = random(rows, (heads + 2 * kv_heads) * width, seed=number, dtype=dtype)
    qkv[1, -width:] = 0  # a head of zeros
    angle = torch.rand(rows, width // 2, generator=torch.Generator().manual_seed(1)).repeat(1, 2) * 6
    cosine, sine = angle.cos().to(dtype), angle.sin().to(dtype)
    norms = [Qwen3RMSNorm(width, 1e-5).to(dtype) for _ in range(2)]
    for norm in norms:
        norm.weight.data.uniform_(0.5, 1.5)
    found = qkv.view(rows, -1, 1, width).split([heads, kv_heads, kv_heads], 1)
    query, key = (part if number == 0 else norm(part).detach() for part, norm in zip(found, norms, strict=False))
    query, key = apply_rotary_pos_emb(query, key, cosine.unsqueeze(1), sine.unsqueeze(1))
    centre = None if number == 0 else random(kv_heads, width, seed=7)
    kept = key if centre is None else (key.float() - centre.unsqueeze(1)).to(dtype)
    wanted = write_record(kept, tables, size), write_record(found[2], tables, size)

    by = RecordTables.of(on(device, tables), size, None if centre is None else centre.to(device))
    rooms = [torch.full((rows, kv_heads, capacity, part.shape[-1]), 7, dtype=torch.uint8, device=device) for part in wanted]
    out = torch.empty(rows, heads, width, dtype=dtype, device=device)
    weights = None if number == 0 else (*(norm.weight.data.to(device) for norm in norms), 1e-5)
    place = torch.tensor([length], dtype=torch.int32, device=device)
    append_records(qkv.to(device), (cosine.to(device), sine.to(device)), weights, place, (by, by), out, *rooms)
    assert torch.equal(out.cpu(), query[:, :, 0])
    for room, records in zip(rooms, wanted, strict=True):
        assert torch.equal(room[:, :, length].cpu(), records[:, :, 0])
        others = torch.cat([room[:, :, :length], room[:, :, length + 1 :]], 2)
        assert bool((others == 7).all())


def test_one_row_of_angles_serves_all(device):
    by, width = RecordTables.of(on(device, KNEE), 16), 16
    qkv = random(2, 4 * width, seed=5).to(device)
    angles = torch.rand(1, width, generator=torch.Generator().manual_seed(2)).to(device)
    found = []
    for part in (angles, angles.expand(2, -1).contiguous()):
        rooms = [torch.zeros(2, 1, 1, 11, dtype=torch.uint8, device=device) for _ in range(2)]
        query = torch.empty(2, 2, width, device=device)
        append_records(qkv, (part, part), None, torch.zeros(1, dtype=torch.int32, device=device), (by, by), query, *rooms)
        found.append([query, *rooms])
    assert all(map(torch.equal, *found))


def test_other_forms_are_not_the_kernels():
    wide = Tables(torch.arange(32).byte().view(1, 32), torch.tensor([9]).byte(), torch.ones(1, 2))
    assert recordable(KNEE, 64)
    assert not recordable(wide, 64)
    assert not recordable(KNEE, 15)
    keys, values = RecordTables.of(KNEE, 16), RecordTables.of(UNIFORM, 16)
    nothing = torch.zeros(1, 1, 1, 11, dtype=torch.uint8)
    with pytest.raises(ValueError, match="different forms"):
        append_records(nothing, (nothing, nothing), None, nothing, (keys, values), nothing, nothing, nothing)


# Reading


def attended(query, records, mask, tables, size, dtype):
    """[rows, heads * width], float64."""
    heads, width = query.shape[1:]
    keys, values = (
        read_record(part, tables, size, width).to(dtype).double().repeat_interleave(heads // part.shape[1], 1) for part in records
    )
    scores = query.double().unsqueeze(2) @ keys.transpose(2, 3) * width**-0.5
    scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    return (scores.softmax(-1) @ values)[:, :, 0].flatten(1)


def joined(device, query, records, mask, tables, size, parts, capacity):
    """Values that the next linear reads: of 4-bit codes of the finest steps there are, [rows, heads * width]; and the parts."""
    (rows, heads, width), held = query.shape, records[0].shape[2]
    rooms = []
    for part in records:
        room = torch.full((rows, part.shape[1], capacity, part.shape[3]), 255, dtype=torch.uint8)
        room[:, :, :held] = part
        rooms.append(room.to(device))
    wide = torch.zeros(rows, capacity, dtype=torch.uint8)
    wide[:, :held] = mask
    by = RecordTables.of(on(device, tables), size)
    sums = torch.full((rows, heads, parts, width), torch.nan, device=device)
    weights = torch.full((rows, heads, parts, 2), torch.nan, device=device)
    length = torch.tensor([held - 1], dtype=torch.int32, device=device)
    query = query.to(device)
    attend_records(query, *rooms, wide.to(device), length, (by, by), width**-0.5, sums, weights)
    places = torch.full((rows, -(-heads * width // 32) * 32), 99, dtype=torch.int8, device=device)
    step = torch.full((rows, places.shape[1] // 32), torch.nan, device=device)
    join_and_quantize(query, sums, weights, length, QuantizerTables.of(on(device, KNEE)), 32, places, step)
    assert not places[:, heads * width :].any()
    values = places.float() * step.repeat_interleave(32, 1)
    return values[:, : heads * width].cpu(), sums.cpu(), weights.cpu()


def combined(sums, weights):
    """What the parts that were reached stand for, float64 [rows, heads * width]."""
    live = ~weights[..., 0].isnan()
    best, total = weights[..., 0].nan_to_num(-torch.inf).double(), weights[..., 1].nan_to_num(0).double()
    kept = (best - best.amax(-1, True)).exp2() * live
    return ((kept.unsqueeze(-1) * sums.nan_to_num(0)).sum(2) / (kept * total).sum(-1, True)).flatten(1)


# What rounding of weights to 16 bits leaves; measured 7.6e-8, 3.2e-4 and 5.8e-5.
TOLERANCES = {torch.float32: 5e-7, torch.bfloat16: 1e-3, torch.float16: 2e-4}


@pytest.mark.parametrize("form", ["two tables", "uniform"])
@pytest.mark.parametrize(
    ("number", "dtype", "held", "parts"),
    [(0, torch.float32, 6, 3), (1, torch.bfloat16, 71, 2), (2, torch.float16, 33, 1)],
)
def test_attention_over_records(device, form, number, dtype, held, parts):
    (width, size, heads, kv_heads), tables, rows = SHAPES[number], FORMS[form], 2
    records = [write_record(random(rows, kv_heads, held, width, seed=seed), tables, size) for seed in (1, 2)]
    query = (random(rows, heads, width, seed=3) * 0.1).to(dtype)  # weights of many tokens count
    mask = torch.rand(rows, held, generator=torch.Generator().manual_seed(4)) < 0.7
    mask[0], mask[1, -1] = True, True
    wanted = attended(query, records, mask, tables, size, dtype)
    values, sums, weights = joined(device, query, records, mask, tables, size, parts, 96)
    size_of = float(wanted.abs().max())
    assert float((combined(sums, weights) - wanted).abs().max()) < TOLERANCES[dtype] * size_of
    # Parts behind the present length are left alone.
    assert int(weights[0, 0, :, 0].isnan().sum()) == parts - min(parts, -(-held // 32))
    quantized = quantize(split_groups(wanted.to(dtype), 32), KNEE)
    expected = dequantize(quantized, KNEE.levels).flatten(1)[:, : heads * width]
    # A value may tip over an edge between two codes: measured 2.2 % of the sum at most.
    assert float((values - expected).abs().sum()) < 0.05 * float(expected.abs().sum())


def test_what_is_masked_does_not_count_and_a_row_without_anything_is_zero(device):
    tables, rows, held = KNEE, 2, 40
    keys, values = (random(rows, 1, held, 16, seed=seed) for seed in (1, 2))
    mask = torch.ones(rows, held, dtype=torch.bool)
    mask[0, :35], mask[1] = False, False
    query = random(rows, 2, 16, seed=3)
    found = []
    for spoil in (0.0, 100.0):
        keys[0, :, :35] += spoil
        values[0, :, :35] -= spoil
        records = [write_record(part, tables, 16) for part in (keys, values)]
        found.append(joined(device, query, records, mask, tables, 16, 2, 64)[0])
    assert torch.equal(*found)
    assert found[0][0].any()
    assert not found[0][1].any()


def test_parts_fill_the_machine_and_are_not_too_short():
    assert parts_of(1, 32, 2048) == 16
    assert parts_of(1, 8, 4096) == 64
    assert parts_of(1, 8, 256) == 4
    assert parts_of(64, 8, 4096) == 1
    assert parts_of(1, 1, 16) == 1
