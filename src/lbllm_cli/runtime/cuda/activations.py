"""The activation quantizer as kernels; the same codes as `format.activations.quantize` but for the rounding of sums."""
import triton
import triton.language as tl


@triton.jit
def quantize_groups(x, lattice, factors, TABLES: tl.constexpr, PLACES: tl.constexpr, STEP: tl.constexpr):
    """Quantizes a tile of groups that is held in registers, each along its second axis.

    x: float32 [groups, size], size a power of two, 0 where there is no value. lattice, factors: pointers to a quantizer's
    `QuantizerTables` (its `.lattice` and `.factors`). TABLES: 1 or 2, 0 for the uniform form. PLACES: `.places`, values of a table in
    `lattice`. STEP: type that steps are rounded to, such as tl.float32.
    Returns T - Z as float32 [groups, size], whole numbers, and the step, float32 [groups]: value = (T - Z) * step.
    """


class QuantizerTables: ...
