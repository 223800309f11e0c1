"""A whole binarized model in training: every block resident, as codes that are decoded as it runs or as latents.

Trained are levels, or one factor per group, norm weights, and quantizers where activations are quantized. Codes change where
latents are trained: their blocks then have weights of their own, put in place before each step.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from lbllm_cli.format.weights import PackedWeight
from lbllm_cli.models.head import Head
from lbllm_cli.models.model import FINAL_NORM, SourceModel
from lbllm_cli.models.stored import stored_block, whole_tensors
from lbllm_cli.parallel.group import ALONE, Group, merged
from lbllm_cli.pipeline.checkpoint import Checkpoint
from lbllm_cli.runtime.attachments import attach
from lbllm_cli.runtime.backend import weight_on
from lbllm_cli.runtime.quantizer import read_quantizers
from lbllm_cli.training.block_linears import linear_groups, put_weights, spread_weights, take_gradients
from lbllm_cli.training.fixed import Fixed
from lbllm_cli.training.interfaces import OwnStep, ParameterGroup
from lbllm_cli.training.master import LEVELS, SCALES, WEIGHTS
from lbllm_cli.training.quantizers import (
    CLIP_FACTORS,
    KNEES,
    TrainableQuantizer,
    anneal,
    mean_clip,
    quantizer_groups,
    quantizer_tensors,
)
from lbllm_cli.training.spread import Spread
from lbllm_cli.training.ste import rounded
from lbllm_cli.training.weights import Nearest

if TYPE_CHECKING:
    from lbllm_cli.recipe.training import EndToEnd

NORMS = "norms"


class Norm(nn.Module):
    """A norm's weight in training, float32 [width]; it is used as its stored dtype holds it.

    weight: where to start. stored: the source model's dtype. offset: what the norm adds to it; rates are relative to the sum.
    """

    def __init__(self, weight: Tensor, stored: torch.dtype, train: tuple[str, ...], offset: float):
        super().__init__()
        self.stored = stored
        self.rms = float((weight.float() + offset).square().mean().sqrt())
        self.weight = nn.Parameter(weight.float().clone(), requires_grad=NORMS in train)

    def forward(self) -> Tensor:
        return rounded(self.weight, self.stored)

    def packed(self) -> Tensor:
        """As a checkpoint holds it."""
        return self.weight.detach().to(self.stored, copy=True)


class ResidentBlock:
    """One block of a checkpoint, on the device: packed codes, masters of what is trained, the rest as the source has it.

    Hidden states [rows, length, hidden] -> the same shape. spread: who has masters of latents.
    """

    def __init__(self, model: SourceModel, index: int, parent: Checkpoint, settings: "EndToEnd", spread: Spread):
        train = settings.trained
        self.spread = spread
        stored = parent.read_block(index)
        block = stored_block(model, index, stored, None)
        self.prefix, self.dtype = block.prefix, block.dtype
        self.block = block
        self.fixed: dict[str, Fixed] = {}
        self.moving: dict[str, Nearest] = {}
        own = spread.add(block.prefix, {name: block.linear(name) for name in block.linears})
        # Latents start from the source's weights as in the other stages: from the decoded ones every code is as far from another
        # as it can be.
        source = model.block(index) if WEIGHTS in train else block
        for name in block.linears:
            spread.expect(block.prefix + name, block.linear(name))
            weight = block.linear(name).weight
            if name not in own:
                block.linear(name).weight = nn.Parameter(torch.empty_like(weight))
                continue
            packed = weight_on(PackedWeight.from_tensors(stored, block.prefix + name, weight.shape[1]), model.device)
            if WEIGHTS in train:
                self.moving[name] = Nearest(source.linear(name).weight, packed, train, settings.latent_margin)
                block.linear(name).weight = nn.Parameter(torch.empty_like(weight))
            else:
                self.fixed[name] = Fixed(weight, packed, train)
                # Decoded anew in every pass; what was read of it is let go of.
                block.linear(name).weight = nn.Parameter(torch.empty(0), requires_grad=False)
        # As they are stored: the block has them in the compute dtype, which may be the shorter one.
        norms = {**model.read(model.norm_names(index)), **whole_tensors(stored)}
        self.norms = {
            name.removeprefix(block.prefix).removesuffix(".weight"): Norm(
                norms[name].to(model.device), model.stored_dtype(name), train, model.family.norm_offset
            )
            for name in model.norm_names(index)
        }
        self.quantizers: dict[str, TrainableQuantizer] = {}
        if parent.activations is not None:
            for name, quantizer in read_quantizers(block.layer, block.units, stored, block.prefix, parent.activations).items():
                self.quantizers[name] = TrainableQuantizer.going_on(quantizer, train).to(model.device)
            attach(block.layer, block.units, dict(self.quantizers))

    def __call__(self, hidden: Tensor) -> Tensor:
        weights = {f"{name}.weight": linear.weight(self.dtype) for name, linear in self.fixed.items()}
        weights |= {f"{name}.weight": norm().to(self.dtype) for name, norm in self.norms.items()}
        outputs: Tensor = functional_call(self.block.layer, weights, (hidden,), self.block.arguments(hidden))
        return outputs

    @property
    def linears(self) -> dict[str, Fixed | Nearest]:
        """All masters by name in the block: either kind alone."""
        return {**self.fixed, **self.moving}

    def begin(self) -> None:
        """Puts the present weights into the block, where latents are trained; others are decoded as it runs."""
        put_weights(self.block, self.moving, self.spread)

    def backward(self) -> None:
        """Carries the gradients of what was put to the masters."""
        take_gradients(self.block, self.moving)

    def snapshot(self) -> dict[str, Tensor]:
        """What training may have changed, under full names: all that a checkpoint holds but codes that are fixed.

        Of linears whose masters are spread, those of this rank.
        """
        tensors: dict[str, Tensor] = {}
        for name, linear in self.linears.items():
            parts = linear.packed().to_tensors(self.prefix + name)
            tensors |= {key: tensor for key, tensor in parts.items() if name in self.moving or not key.endswith(".weight")}
        tensors |= {f"{self.prefix}{name}.weight": norm.packed() for name, norm in self.norms.items()}
        return tensors | quantizer_tensors(self.prefix, self.quantizers)


class WholeStudent:
    """All blocks of a checkpoint, with embedding and head, on one device.

    recompute: on the way back blocks are computed again from their inputs; otherwise all that they computed is kept. group: of
    ranks that train it together.
    """

    def __init__(
        self, model: SourceModel, parent: Checkpoint, settings: "EndToEnd", recompute: bool = True, group: Group = ALONE
    ):
        self.settings = settings
        self.recompute = recompute
        train = settings.trained
        self.spread = Spread(group, train)
        self.blocks = [ResidentBlock(model, index, parent, settings, self.spread) for index in range(model.blocks)]
        head: Any = model.head()
        self._norm: nn.Module = head[0]
        self.head: Head = head[1]
        # What the teacher's states go through: the source's own.
        self._source_norm: Tensor = head[0].weight
        start = (model.read([FINAL_NORM]) | parent.read_outer())[FINAL_NORM].to(model.device)
        self.norm = Norm(start, model.stored_dtype(FINAL_NORM), train, model.family.norm_offset)
        self.embedding = model.embed()
        if model.config.tie_word_embeddings and model.family.embedding_scale(model.config) == 1:
            self.embedding.weight = self.head.weight
        self.dtype = model.dtype

    def __call__(self, tokens: Tensor) -> Tensor:
        """Last hidden states after the norm: int64 [rows, length] -> [rows, length, hidden]."""
        hidden = self.embedding(tokens)
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                hidden = checkpoint(block, hidden, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden = block(hidden)
        return self._normed(hidden, self.norm().to(self.dtype))

    def teacher(self, states: Tensor) -> Tensor:
        """The teacher's hidden states after its norm."""
        return self._normed(states, self._source_norm)

    def _normed(self, hidden: Tensor, weight: Tensor) -> Tensor:
        normed: Tensor = functional_call(self._norm, {"weight": weight}, (hidden,))
        return normed

    def _quantizers(self) -> list[TrainableQuantizer]:
        return [quantizer for block in self.blocks for quantizer in block.quantizers.values()]

    def groups(self) -> list[ParameterGroup]:
        """AdamW groups, one per tensor: rates are relative to the RMS of the weights, of norms to their own."""
        return self._linear_groups() + self._other_groups()

    def _linear_groups(self) -> list[ParameterGroup]:
        settings: Any = self.settings
        groups = []
        rates = {WEIGHTS: settings.lr_weights, LEVELS: settings.lr_levels, SCALES: settings.lr_levels}
        for block in self.blocks:
            groups += linear_groups(block.linears.values(), {kind: rates[kind] for kind in rates if kind in settings.trained})
        return groups

    def _other_groups(self) -> list[ParameterGroup]:
        settings: Any = self.settings
        groups = []
        for norm in (*(norm for block in self.blocks for norm in block.norms.values()), self.norm):
            if NORMS in settings.trained:
                groups.append(ParameterGroup([norm.weight], NORMS, settings.lr_norms * norm.rms, norm.rms))
        # A phase without quantizers has no rates for them.
        kinds = {CLIP_FACTORS, KNEES} & set(settings.trained)
        return groups + quantizer_groups(self._quantizers(), {kind: getattr(settings, f"lr_{kind}") for kind in kinds})

    def spread_weights(self) -> list[tuple[nn.Parameter, int]]:
        """Of all blocks, where latents are trained."""
        return [found for block in self.blocks for found in spread_weights(block.block, self.spread)]

    def copies(self) -> list[nn.Parameter]:
        """Norms, quantizers, and levels of fixed codes."""
        groups = ([] if self.spread.large else self._linear_groups()) + self._other_groups()
        return [p for group in groups for p in group.params]

    def begin(self, progress: float) -> None:
        """Puts the weights that are trained into their blocks; knees are soft in the first part of training, where they are
        trained.
        """
        settings: Any = self.settings
        for block in self.blocks:
            block.begin()
        if KNEES in settings.trained:
            anneal(self._quantizers(), progress, settings.soft, settings.soft_knee)

    def settle(self) -> None:
        """Weights of other ranks have come."""
        self.spread.all_arrived()

    def backward(self) -> None:
        """Carries gradients of weights that were put into their blocks to latents and levels; autograd has carried all others."""
        for block in self.blocks:
            block.backward()

    def own_steps(self) -> list[OwnStep]:
        """Latents that move themselves."""
        dampening = self.settings.dampening
        return [one for block in self.blocks for linear in block.linears.values() for one in linear.own_steps(dampening)]

    def constrain(self) -> None:
        """After a step."""
        for block in self.blocks:
            for linear in block.linears.values():
                linear.constrain(self.settings.dampening)
        for quantizer in self._quantizers():
            quantizer.constrain()

    def resumed(self) -> None:
        """After the parameters were replaced by saved ones."""
        for quantizer in self._quantizers():
            quantizer.deploy()

    def snapshot(self) -> dict[str, Tensor]:
        """What training may have changed, of all blocks, and the final norm, on every rank."""
        tensors = {FINAL_NORM: self.norm.packed()}
        for block in self.blocks:
            own = block.snapshot()
            tensors |= merged(self.spread.node, own) if self.spread.large else own
        return tensors

    def facts(self) -> dict[str, float]:
        """Mean clipping factor, where there are any."""
        quantizers = self._quantizers()
        return {"clip_factor": mean_clip(quantizers)} if quantizers else {}
