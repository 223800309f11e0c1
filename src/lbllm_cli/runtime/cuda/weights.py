"""The weights of linears that read one input, below each other, in the layout of the kernels; and back, bit for bit.

The layout is row-major like the stored one, so a warp's lanes lie along a row: each reads 16 bytes of codes, 64 weights, beside
its neighbour's, 512 bytes in one coalesced load, and keeps its part of the activations in registers for all rows of a program.
Only the order within a group differs. A word holds 16 codes as four selectors for `prmt`, which looks up four bytes by the low
two bits of each nibble of a 16-bit half: no code has to be moved but by one shift. And the columns of `span` words are dealt out
so that the first selectors of neighbouring words belong to neighbouring columns: what a lane needs of the activations are loads
of up to 16 bytes too.

Groups of 16 or 32 are too small for that. Where a row has one scale, four of them are folded: laid out as one group of four
times the size, of which each selector is that of one of the four.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import gcd

import torch
from torch import Tensor
from torch.nn.functional import pad

from lbllm_cli.format.levels import per_row
from lbllm_cli.format.weights import PackedWeight, group_count

CODES_OF_WORD = 16
# Where in a word the four selectors begin; their codes are 4 bits apart.
SELECTOR_BITS = (0, 2, 16, 18)
# Groups that are folded, and their sizes: of larger ones a group would have several selectors. What tensor cores take.
FOLD, _FOLDED, _COLUMNS_MIN = 4, (16, 32), 32


def span(group_size: int) -> int:
    """Words whose columns are dealt out in turn: 8 at groups of 128, 2 at groups of 32."""
    return gcd(group_size // CODES_OF_WORD, 8)


def _spread(quads: Tensor) -> Tensor:
    """Four 2-bit codes of a byte, 4 bits apart: int32 0..255 -> 0..0x3333."""
    quads = (quads | (quads << 4)) & 0x0F0F
    return (quads | (quads << 2)) & 0x3333


def _gathered(halves: Tensor) -> Tensor:
    """Inverse of `_spread`."""
    halves = (halves | (halves >> 2)) & 0x0F0F
    return (halves | (halves >> 4)) & 0xFF


def words_of(codes: Tensor) -> Tensor:
    """Codes as words: uint8 [out, groups, group_size / 4] -> int32 [out, groups, group_size / 16].

    With V = span, selector s of word V * m + v holds columns 16 * V * m + 4 * V * s + 4 * v to + 3 of the group, column i of them
    in the two bits from SELECTOR_BITS[s] + 4 * i. [6, 5, 32] -> [6, 5, 8].
    """
    width = span(codes.shape[2] * 4)
    quads = codes.unflatten(2, (-1, len(SELECTOR_BITS), width))
    parts = [_spread(quads[:, :, :, s].int()) << bit for s, bit in enumerate(SELECTOR_BITS)]
    return (parts[0] | parts[1] | parts[2] | parts[3]).flatten(2)


def codes_of(words: Tensor) -> Tensor:
    """Inverse of `words_of`."""
    width = span(words.shape[2] * CODES_OF_WORD)
    split = words.unflatten(2, (-1, width))
    quads = [_gathered((split >> bit) & 0x3333).to(torch.uint8) for bit in SELECTOR_BITS]
    return torch.stack(quads, 3).flatten(2)


def foldable(linear: PackedWeight, sharing: int) -> bool:
    """Whether four groups can be folded, of which `sharing` share a step of their input, 0 for all of a row."""
    # Else a matrix product of what shares a step has fewer columns than tensor cores take.
    whole = sharing % FOLD == 0 or (FOLD % sharing == 0 and sharing * linear.group_size >= _COLUMNS_MIN)
    return per_row(linear.level_bits) and linear.group_size in _FOLDED and whole


def _parts(linear: PackedWeight, fold: int) -> tuple[Tensor, Tensor, Tensor]:
    """Words, levels and scale as `CudaWeights` has them, of one linear."""
    if linear.row_scale is None:
        return words_of(linear.codes), linear.levels.contiguous().view(torch.int32).squeeze(-1), linear.scale
    codes, places, scale = linear.stored
    spare = -codes.shape[1] % fold
    codes, places = pad(codes, (0, 0, 0, spare)), pad(places.squeeze(-1), (0, spare))
    return words_of(codes.unflatten(1, (-1, fold)).flatten(2)), places, scale


@dataclass(frozen=True)
class CudaWeights:
    """Rows of several linears with one input, the first linear's first.

    words: int32 [rows, groups, group_size / 16], of folded groups [rows, groups / 4, group_size / 4]. levels: int32 [rows,
    groups], a group's four int8 levels, that of code 0 lowest; levels of 2 bits as a file has them, uint8 [rows, groups]. scale:
    float16 [rows, groups], or [rows, 1] with levels of 2 bits. outs: rows of each linear. level_bits: of a level in their file.
    q, k and v of 4096 x 4096 at groups of 128: [12288, 32, 8], [12288, 32], 2.375 bits a weight; at groups of 16 with levels of 2
    bits, folded, [12288, 64, 4], [12288, 256], 2.504.
    """

    words: Tensor
    levels: Tensor
    scale: Tensor
    in_features: int
    group_size: int
    outs: tuple[int, ...]
    level_bits: int

    @classmethod
    def of(cls, linears: Sequence[PackedWeight], fold: bool = False) -> "CudaWeights":
        """Repacked, on their device. fold: four groups each, which `foldable` allows."""
        first = linears[0]
        parts = [_parts(linear, FOLD if fold else 1) for linear in linears]
        words, levels, scale = (torch.cat(of_each) for of_each in zip(*parts, strict=True))
        outs = tuple(len(linear.scale) for linear in linears)
        return cls(words, levels, scale, first.in_features, first.group_size, outs, first.level_bits)

    def packed(self, slot: int) -> PackedWeight:
        """One of the linears as its checkpoint has it."""
        end = list(accumulate(self.outs))[slot]
        words, levels, scale = (part[end - self.outs[slot] : end] for part in (self.words, self.levels, self.scale))
        codes = codes_of(words).unflatten(2, (self.fold, -1)).flatten(1, 2)[:, : self.groups]
        stored = levels.unsqueeze(-1)[:, : self.groups]
        # A file's bytes are what `of_stored` reads, words hold int8.
        as_file = stored if per_row(self.level_bits) else stored.view(torch.int8)
        found = PackedWeight.of_stored(codes, as_file, scale, self.in_features)
        return replace(found, level_bits=self.level_bits)

    @property
    def fold(self) -> int:
        """Groups that are laid out as one."""
        return self.levels.shape[1] // self.words.shape[1]

    @property
    def rows(self) -> int:
        """Outputs of all linears."""
        return self.scale.shape[0]

    @property
    def groups(self) -> int:
        """Groups in a row, a ragged last one included."""
        return group_count(self.in_features, self.group_size)

    @property
    def padded_width(self) -> int:
        """Inputs with those that fill up the last groups, whose codes are 0: their activations have to be 0."""
        return self.words[0].numel() * CODES_OF_WORD
