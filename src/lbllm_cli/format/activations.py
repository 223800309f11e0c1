"""The activation quantizer: the only place that turns activations, keys and values into codes, or codes into values.

x is cut into groups along its last axis. A group is stored as codes and a step d; code c stands for d * (T[c] - Z), where T is
an ascending table of 2^bits integers and Z, the lattice place of zero, is one of them: zero stays zero. The step is dynamic:
codes are chosen with one that comes from the group's own extremes, then it is refitted to them by least squares. T and Z are
one of two kinds:

    knee      static tables, one or two per quantizer, of which a group takes the one with the smaller error. Fine steps of 1
              about zero, coarse steps of an integer ratio beyond the knees (LBLLM stage 3: dense and sparse regions).
    uniform   T = 0, 1, 2, ..., and Z as dynamic as the step: the plain asymmetric quantizer.

T lies in 0..127 for up to 7 bits (0..255 for 8), so that products with int8 levels are exact in integer dot products.

Keys may be centred: what is quantized, and what attention then reads, is a key minus a constant vector of its head. A query's
scores all move by one number, which its softmax does not see, so nothing adds the vector again.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lbllm_cli.format.names import CENTRE, CLIP_UNIT, KEYS, TENSORS, VALUES, step_size

# Steps below this have no finite reciprocal worth using: the group is zero.
_SMALLEST_STEP = 1e-30
# A knee table is tried with the step that reaches the group's extremes and with a smaller one, and the better is taken. Together
# with the refit that leaves 6 % less squared error on the inputs of two blocks of SmolLM2-135M, the refit alone 3 %.
_SHARES = (1.0, 0.88)


# Steps of keys and values are stored in the cache: 2 bytes, with the range of float32.
KV_STEP = torch.bfloat16
def stored_clip(clip: Tensor) -> Tensor:
    """Clipping factors as they are stored: float [...] -> int32 [...], in units of 2^-16."""
    return (clip * CLIP_UNIT).round().to(torch.int32)


@dataclass(frozen=True)
class ActivationFormat:
    """How the activations of a checkpoint are quantized.

    bits, kv_bits: 3 to 8. granularity: a step per token and group, or per token. form, kv_form: see above. tables: of a knee
    quantizer. group_size: inputs in a group; that of the weights. Keys and values have a step per token, head and group.
    key_centre: whether keys are centred.
    """

    bits: int
    kv_bits: int
    granularity: Literal["group", "token"]
    form: Literal["knee", "uniform"]
    kv_form: Literal["knee", "uniform"]
    tables: int
    group_size: int
    key_centre: bool = False

    def size(self, name: str, width: int) -> int:
        """Values that share a step: see `names.step_size`."""
        return step_size(name, width, self.granularity, self.group_size)

    def empty(self, name: str) -> "Tables":
        """Tables of the right shapes for the quantizer `name`, to be filled by a loader."""
        cached = name in (KEYS, VALUES)
        bits, form = (self.kv_bits, self.kv_form) if cached else (self.bits, self.form)
        count = self.tables if form == "knee" else 1
        zero = torch.zeros(count, dtype=torch.uint8) if form == "knee" else None
        return Tables(torch.zeros(count, 2**bits, dtype=torch.uint8), zero, torch.ones(count, 2))

    def tensors(self, name: str) -> tuple[str, ...]:
        """What the tensors of the quantizer `name` are called behind its name."""
        return (*TENSORS, CENTRE) if name == KEYS and self.key_centre else TENSORS

    def as_dict(self) -> dict[str, Any]:
        """For manifests and config.json; a key that earlier readers do not know is there where it says something."""
        found = asdict(self)
        return found if self.key_centre else {key: value for key, value in found.items() if key != "key_centre"}


def format_of(manifest: dict[str, Any]) -> ActivationFormat | None:
    """Of a stage's manifest or a packed model's quantization_config; None where activations are in full precision."""
    values = manifest.get("activations")
    return ActivationFormat(**values) if values else None


def stored_centre(keys: Tensor) -> Tensor:
    """The mean of keys as it is stored, in units of 2^-16: float [rows, heads, tokens, width] -> int32 [heads, width].

    [2, 3, 96, 64] -> [3, 64].
    """
    mean = keys.float().mean((0, 2))
    return (mean * CLIP_UNIT).round().clamp(-(2.0**30), 2.0**30).to(torch.int32)


class Tables(NamedTuple):
    """What a quantizer knows before it sees data.

    levels: uint8 [tables, 2^bits], T of each table, ascending. zero: uint8 [tables], Z of each table; None: uniform, one table.
    clip: float32 [tables, 2], the share of a group's largest positive and largest negative value that is represented.
    """

    levels: Tensor
    zero: Tensor | None
    clip: Tensor


class Quantized(NamedTuple):
    """Groups after quantization.

    values: float32 [..., size], d * (T - Z). step: float32 [...], d. zero: integers [...], Z. table: integers [...], which table
    the group took.
    """

    values: Tensor
    step: Tensor
    zero: Tensor
    table: Tensor


class Codes(NamedTuple):
    """A quantized tensor of groups.

    codes: uint8 [..., size]. step: float32 [...], d. zero: uint8 [...], Z. table: int64 [...], which table the group took.
    """

    codes: Tensor
    step: Tensor
    zero: Tensor
    table: Tensor


def split_groups(x: Tensor, size: int) -> Tensor:
    """Cuts the last axis into groups, zeros in the tail of a ragged last one: [2, 7, 576], 128 -> [2, 7, 5, 128]."""
    width = x.shape[-1]
    groups = -(-width // size)
    if groups * size != width:
        x = torch.nn.functional.pad(x, (0, groups * size - width))
    return x.unflatten(-1, (groups, size))


def join_groups(groups: Tensor, width: int) -> Tensor:
    """Inverse of `split_groups`: [2, 7, 5, 128], 576 -> [2, 7, 576]."""
    return groups.flatten(-2)[..., :width]


def uniform_levels(bits: int) -> Tensor:
    """T of the uniform kind: uint8 [1, 2^bits]."""
    return torch.arange(2**bits, dtype=torch.uint8).unsqueeze(0)


def snap_table(levels: Tensor) -> Tensor:
    """Code nearest to each lattice place, the lower one on a tie: uint8 [n] ascending -> int64 [levels[-1] + 1]."""
    values = levels.long()
    middle = values[1:] + values[:-1]
    return torch.searchsorted(middle, 2 * torch.arange(int(values[-1]) + 1, device=levels.device))


def extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Largest positive value and size of the largest negative one of each group, both >= 0: [..., size] -> [...], [...]."""
    return x.amax(-1).clamp_(min=0), x.amin(-1).neg_().clamp_(min=0)


def knee_step(high: Tensor, low: Tensor, levels: Tensor, zero: Tensor, clip: Tensor) -> Tensor:
    """Step of one static table: the smallest that reaches both clipped extremes. high, low: [...]; levels [n]; clip [2]."""
    above, below = float(levels[-1]) - float(zero), float(zero)
    up = high * (clip[0] / above) if above else torch.zeros_like(high)
    return torch.maximum(up, low * (clip[1] / below)) if below else up


def reciprocal(step: Tensor) -> Tensor:
    """1 / step, 0 for a group of zeros."""
    return torch.where(step > _SMALLEST_STEP, step, torch.inf).reciprocal()


class _Candidate(NamedTuple):
    """One static table with one share of the reach, and what is looked up in it."""

    table: int
    levels: Tensor
    zero: Tensor
    clip: Tensor
    share: float
    lattice: Tensor  # float32, T[nearest code] - Z of each lattice place
    start: int  # of its places among those of all tables


def _candidates(tables: Tables, snaps: list[Tensor]) -> list[_Candidate]:
    assert tables.zero is not None
    found, start = [], 0
    for index, (levels, zero, clip, snap) in enumerate(zip(tables.levels, tables.zero, tables.clip, snaps, strict=True)):
        lattice = levels.float()[snap] - float(zero)
        found += [_Candidate(index, levels, zero, clip, share, lattice, start) for share in _SHARES]
        start += len(snap)
    return found


def _places(x: Tensor, step: Tensor, top: int, zero: float) -> Tensor:
    """Lattice place of each value with one static table, before it goes to the nearest level: int32 [..., size]."""
    place = (x * reciprocal(step).unsqueeze(-1)).round_().add_(zero)
    # Clamped as integers: what is not finite has a step that is not either, but must have a code.
    return place.to(torch.int32).clamp_(0, top)


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """table[index]; on a CPU three times as fast as indexing."""
    return table.index_select(0, index.reshape(-1)).view(index.shape)


def _refit(x: Tensor, lattice: Tensor) -> Tensor:
    """The step that is best for given codes, sum(x l) / sum(l^2), l = T - Z: [..., size] -> [...]; 0 where every code is zero."""
    return (x * lattice).sum(-1) / lattice.square().sum(-1).clamp_(min=1)


def _quantize_knee(x: Tensor, tables: Tables, step_dtype: torch.dtype, piece: int | None) -> Codes:
    snaps = [snap_table(levels) for levels in tables.levels]
    candidates, snap = _candidates(tables, snaps), torch.cat(snaps).to(torch.uint8)
    rows = x.reshape(-1, x.shape[-1])
    count = max(1, len(rows) if piece is None else piece // x.shape[-1])
    parts = [_best_codes(part, candidates, snap) for part in rows.split(count)]
    joined = Codes(*(torch.cat(part).view(*x.shape[:-1], *part[0].shape[1:]) for part in zip(*parts, strict=True)))
    return joined._replace(step=joined.step.to(step_dtype).float())


def _best_codes(x: Tensor, candidates: list[_Candidate], snap: Tensor) -> Codes:
    """For each of [rows, size] the candidate with the least error."""
    high, low = extremes(x)
    best: Codes | None = None
    least = high
    for candidate in candidates:
        table, levels, zero, clip, share, lattice_of, start = candidate
        reach = knee_step(high, low, levels, zero, clip)
        place = _places(x, reach * share, int(levels[-1]), float(zero))
        lattice = _look_up(lattice_of, place)
        step = _refit(x, lattice)
        # Not from the sums of the refit: the difference of two numbers near |x|^2 is mostly rounding.
        error = lattice.mul_(step.unsqueeze(-1)).sub_(x).square_().sum(-1)
        found = Codes(place.add_(start), step, zero.expand_as(step), torch.full_like(step, table, dtype=torch.int64))
        if best is None:
            best, least = found, error
            continue
        better = error < least
        least = torch.where(better, error, least)
        best = Codes(
            torch.where(better.unsqueeze(-1), found.codes, best.codes),
            *(torch.where(better, new, old) for new, old in zip(found[1:], best[1:], strict=True)),
        )
    assert best is not None
    return best._replace(codes=_look_up(snap, best.codes))


def _quantize_uniform(x: Tensor, tables: Tables, step_dtype: torch.dtype) -> Codes:
    high, low = extremes(x)
    top = tables.levels.shape[1] - 1
    up, down = high * tables.clip[0, 0], low * tables.clip[0, 1]
    inverse = reciprocal((up + down) / top)
    zero = (down * inverse).round_().clamp_(0, top)
    codes = (x * inverse.unsqueeze(-1)).round_().add_(zero.unsqueeze(-1)).clamp_(0, top)
    step = _refit(x, codes - zero.unsqueeze(-1))
    table = torch.zeros_like(step, dtype=torch.int64)
    return Codes(codes.to(torch.uint8), step.to(step_dtype).float(), zero.to(torch.uint8), table)


def quantize(x: Tensor, tables: Tables, step_dtype: torch.dtype = torch.float32, piece: int | None = None) -> Codes:
    """Quantizes groups: x float [..., size] -> codes [..., size], step, zero and table [...].

    step_dtype: what steps are rounded to and stored in. piece: values that are worked on at once, None for all; the result is the
    same. [2, 7, 9, 64] with two tables of 16 levels -> codes [2, 7, 9, 64], the rest [2, 7, 9].
    """
    if tables.zero is None:
        return _quantize_uniform(x.float(), tables, step_dtype)
    return _quantize_knee(x.float(), tables, step_dtype, piece)


def places(codes: Codes, levels: Tensor) -> Tensor:
    """Lattice places T of a quantized tensor: uint8 [..., size], the integer operand of a kernel."""
    whole = codes.codes.int()
    if levels.shape[0] > 1:
        whole += (codes.table.int() * levels.shape[1]).unsqueeze(-1)
    return _look_up(levels.flatten(), whole)


def dequantize(codes: Codes, levels: Tensor) -> Tensor:
    """Values of a quantized tensor: float32 [..., size], d * (T - Z) with one rounding."""
    lattice = places(codes, levels).float() - codes.zero.float().unsqueeze(-1)
    return lattice.mul_(codes.step.unsqueeze(-1))


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Packs codes densely, code i in bits i*bits and up, little endian; for 4 bits two to a byte, the first one low.

    codes: uint8 [..., n], n * bits divisible by 8. Returns uint8 [..., n * bits / 8]. [3, 64], 4 -> [3, 32].
    """
    if bits == 8:
        return codes.clone()
    if bits == 4:
        return codes[..., 0::2] | (codes[..., 1::2] << 4)
    shifts = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    stream = ((codes.unsqueeze(-1) >> shifts) & 1).flatten(-2).unflatten(-1, (-1, 8))
    return (stream << torch.arange(8, dtype=torch.uint8, device=codes.device)).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `pack_bits`: uint8 [..., n * bits / 8] -> uint8 [..., n]."""
    if bits == 8:
        return packed.clone()
    if bits == 4:
        return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
    places_of_byte = torch.arange(8, dtype=torch.uint8, device=packed.device)
    stream = ((packed.unsqueeze(-1) >> places_of_byte) & 1).flatten(-2).unflatten(-1, (-1, bits))
    return (stream << torch.arange(bits, dtype=torch.uint8, device=packed.device)).sum(-1, dtype=torch.uint8)
