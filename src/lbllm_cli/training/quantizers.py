"""An activation quantizer in training: clipping factors, and the coarse ratios that place its knees."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lbllm_cli.format.activations import Tables, stored_clip
from lbllm_cli.format.names import CENTRE, CLIP_RANGE, TENSORS
from lbllm_cli.runtime.backend import backend_of
from lbllm_cli.runtime.quantizer import ActQuantizer
from lbllm_cli.training.act_ste import fake_quantize, fused_fake, fused_soft, soft_quantize
from lbllm_cli.training.interfaces import ParameterGroup
from lbllm_cli.training.knees import Shape, tables_of

CLIP_FACTORS, KNEES = "clip_factors", "knees"
Quantizers = dict[str, "TrainableQuantizer"]


class TrainableQuantizer(ActQuantizer):
    """An ActQuantizer whose clipping factors, float32 [tables, 2], and log coarse ratios, float32 [tables, 2], have gradients.

    tables: where to start. shapes: of knee tables, None in the uniform form. train: kinds of parameters that get gradients.
    centre: of centred keys, int32 [heads, width]. Under no_grad the forward pass is always the deployed form; with gradients it
    is the soft form while `temperature` is above 0 and knees are trained.
    """

    def __init__(
        self, tables: Tables, shapes: list[Shape] | None, size: int, step_dtype: torch.dtype, train: tuple[str, ...],
        centre: Tensor | None = None
    ):  # fmt: skip
        super().__init__(tables, size, step_dtype, centre)
        self.shapes = shapes
        self.temperature = 0.0
        self.clip = nn.Parameter(tables.clip.clone(), requires_grad=CLIP_FACTORS in train)
        device = tables.clip.device
        ratios = torch.tensor([[shape.ratio_low, shape.ratio_high] for shape in shapes or []], device=device).float()
        counts = torch.tensor([shape[:4] for shape in shapes or []], device=device).float()
        self.log_ratio = nn.Parameter(ratios.log(), requires_grad=KNEES in train and bool(shapes))
        self.register_buffer("counts", counts, persistent=False)

    @classmethod
    def going_on(cls, quantizer: ActQuantizer, train: tuple[str, ...]) -> "TrainableQuantizer":
        """The quantizer of a checkpoint, to be trained further."""
        tables = quantizer.tables
        rows = zip(tables.levels.tolist(), [] if tables.zero is None else tables.zero.tolist(), strict=False)
        shapes = None if tables.zero is None else [Shape.of(levels, zero) for levels, zero in rows]
        return cls(tables, shapes, quantizer.size, quantizer.step_dtype, train, quantizer.act_centre)

    def kinds(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by kind, frozen ones included."""
        return {CLIP_FACTORS: [self.clip]} | ({KNEES: [self.log_ratio]} if self.shapes else {})

    def in_dtype(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or backend_of(x.device).kernels is None:
            return super().in_dtype(x)
        if self.temperature and self.log_ratio.requires_grad:
            counts, ratio = self.get_buffer("counts"), self.log_ratio.exp()
            return fused_soft(x, ratio, self.clip, counts, self.temperature, self.tables, self.size, self.step_dtype)
        return fused_fake(x, self.clip, self.tables, self.size, self.step_dtype)

    def values(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().values(x)
        if self.temperature and self.log_ratio.requires_grad:
            with torch.no_grad():
                table = self.quantized(x).table
            counts = self.get_buffer("counts")
            return soft_quantize(x.float(), table, counts, self.log_ratio.exp(), self.clip, self.temperature)
        return fake_quantize(x, self.clip, self.tables, self.step_dtype)

    @torch.no_grad()
    def constrain(self) -> None:
        """After a step: factors and ratios stay where they mean something, the deployed form follows."""
        self.clip.clamp_(*CLIP_RANGE)
        self.log_ratio.clamp_(min=0)
        self.deploy()

    @torch.no_grad()
    def deploy(self) -> None:
        """The deployed form of the present parameters: ratios rounded to integers that fit the lattice."""
        levels, zero = self.act_levels, self.act_zero
        kernels = backend_of(levels.device).kernels
        if self.shapes and kernels is not None:
            levels, zero = kernels.deployed_tables(self.get_buffer("counts"), self.log_ratio.exp(), levels.shape[1])
        elif self.shapes:
            moved = [self._rounded(shape, row) for shape, row in zip(self.shapes, self.log_ratio.exp().tolist(), strict=True)]
            tables = tables_of(moved, levels.device)
            assert tables.zero is not None
            levels, zero = tables.levels, tables.zero
        self.act_levels, self.act_zero, self.act_clip = levels, zero, stored_clip(self.clip)

    def moved_ratios(self) -> Tensor:
        """1 where a coarse ratio is another integer than at the start, float32 [tables * 2]."""
        start = torch.tensor([[shape.ratio_low, shape.ratio_high] for shape in self.shapes or []], device=self.clip.device)
        return (self.log_ratio.detach().exp().round() != start).float().flatten()

    @staticmethod
    def _rounded(shape: Shape, ratios: list[float]) -> Shape:
        found = shape._replace(ratio_low=max(1, round(ratios[0])), ratio_high=max(1, round(ratios[1])))
        while not found.valid():
            side = "ratio_low" if found.ratio_low * found.coarse_low > found.ratio_high * found.coarse_high else "ratio_high"
            found = found._replace(**{side: getattr(found, side) - 1})
        return found


def quantizer_groups(quantizers: Iterable[TrainableQuantizer], rates: dict[str, float]) -> list[ParameterGroup]:
    """AdamW groups, one per quantizer and kind that has a rate."""
    kinds = [pair for quantizer in quantizers for pair in quantizer.kinds().items() if pair[0] in rates]
    return [ParameterGroup(parameters, kind, rates[kind], 1.0) for kind, parameters in kinds]


def anneal(quantizers: Iterable[TrainableQuantizer], progress: float, soft: float, temperatures: list[float]) -> None:
    """Knees are soft in the first `soft` of training, from one temperature to the other; then they stay."""
    first, last = temperatures
    for quantizer in quantizers:
        quantizer.temperature = first * (last / first) ** (progress / soft) if progress < soft else 0.0


def quantizer_tensors(prefix: str, quantizers: Quantizers) -> dict[str, Tensor]:
    """What a checkpoint holds of a block's quantizers. prefix: of the block's tensors."""
    buffers = {f"{prefix}{name}.{part}": q._buffers.get(part) for name, q in quantizers.items() for part in (*TENSORS, CENTRE)}
    return {name: buffer.clone() for name, buffer in buffers.items() if buffer is not None}


def mean_clip(quantizers: Iterable[TrainableQuantizer]) -> float:
    """Mean clipping factor."""
    return float(torch.cat([quantizer.clip.detach().flatten() for quantizer in quantizers]).mean())
