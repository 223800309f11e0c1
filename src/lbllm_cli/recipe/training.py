"""Sections of the recipe for everything that trains."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lbllm_cli.recipe.base import COUNT, GroupSize, Positive, StageSection
from lbllm_cli.recipe.stages import ParentName
from lbllm_cli.recipe.text import Sources

SoftKnee = Annotated[list[Annotated[float, Field(ge=1e-4, le=10)]], Field(min_length=2, max_length=2)]


class Schedule(StageSection):
    """What everything that trains has in common."""

    epochs: int = Field(2, ge=0, le=100, description="passes over the training sequences; 0 trains nothing")
    batch_size: Positive = Field(2, description="sequences in an optimizer step")
    micro_batch_size: Positive = Field(
        4, description="most sequences in one forward and backward pass; gradients add up to a step"
    )
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps in which rates rise; then they fall as a cosine")
    clip: float = Field(2.0, ge=1e-6, le=1e6, description="largest gradient norm, in units of its running mean")
    held_out: float = Field(0.0625, gt=0, lt=1, description="share of the sequences that choose the best epoch")
    max_skipped: int = Field(10, ge=0, le=COUNT, description="steps of a block or a phase that may be skipped, not being finite")
    train: Sequence[str] | None

    @property
    def trained(self) -> tuple[str, ...]:
        """Kinds of parameters that are trained."""
        return tuple(self.train or ())

    @model_validator(mode="after")
    def _kinds_differ(self) -> "Schedule":
        if len(set(self.trained)) != len(self.trained):
            raise ValueError(f"train: {', '.join(self.trained)} names a kind twice")
        if self.trained == ("knees",):
            raise ValueError("train: knees alone: once they are no longer soft nothing has a gradient; name clip_factors as well")
        return self


class Training(Schedule):
    """What the stages that train a block have in common."""

    lr_weights: float = Field(2e-2, gt=0, le=1, description="AdamW rate of latents, relative to the RMS of the linear's weights")
    lr_levels: float = Field(1e-2, gt=0, le=1, description="AdamW rate of levels, relative to the same RMS")
    loss: Literal["robust", "plain", "mixed"] = Field(
        "robust",
        description="plain: squared error over all tokens; robust: of tokens far off, beyond 100 times the usual squared error, "
        "the distance counts instead of its square; mixed: half of plain over ordinary tokens alone",
    )
    channel_cap: Annotated[float, Field(ge=1, le=1e9)] | None = Field(
        None,
        description="most energy of a channel of a block's outputs, in units of the median channel's; one with more counts as if "
        "it were scaled down to that, in reported errors too; null: all channels count as they are",
    )
    latent_margin: float = Field(
        0.2, ge=0, le=1, description="how far inside its code's cell a latent starts at least, 1: on its level"
    )
    dampening: float = Field(
        0.003, ge=0, lt=1, description="share of the way to its level that a latent is pulled in every step, against chatter"
    )


class EndToEnd(Schedule):
    """Training of the whole model against the teacher's next-token distributions."""

    source: Sources | None = Field(
        None,
        description="text; default that of data.training, of which sequences are taken that it does not hold",
    )
    sequences: Annotated[int, Field(ge=2, le=COUNT)] = Field(128, description="sequences of data.training.length tokens")
    skip: Annotated[int, Field(ge=0, le=COUNT)] | None = Field(
        None,
        description="sequences of the sources to leave out, sampled text aside; default those that data.training and a phase "
        "before it hold of the same texts",
    )
    epochs: int = Field(1, ge=0, le=100, description="passes over the sequences; fresh text is worth more than a second pass")
    micro_batch_size: Positive = Field(
        1, description="most sequences in one forward and backward pass; gradients add up to a step"
    )
    batch_size: Positive = Field(1, description="sequences in an optimizer step")
    lr_weights: float = Field(5e-3, gt=0, le=1, description="AdamW rate of latents, relative to the RMS of the linear's weights")
    lr_levels: float = Field(
        1e-3, gt=0, le=1,
        description="AdamW rate of levels and scales, relative to the RMS of the weights; scales of rows, with ptq.level_bits 2, "
        "have by default 6e-3 in distill and 4e-3 in act_calib",
    )  # fmt: skip
    lr_norms: float = Field(1e-3, gt=0, le=1, description="AdamW rate of norm weights, relative to their RMS")
    latent_margin: float = Field(
        0.2, ge=0, le=1, description="how far inside its code's cell a latent starts at least, 1: on its level"
    )
    dampening: float = Field(
        0.003, ge=0, lt=1, description="share of the way to its level that a latent is pulled in every step, against chatter"
    )
    temperature: float = Field(1.0, ge=0.01, le=10, description="of both distributions in the KL divergence")
    next_token: float = Field(0.0, ge=0, le=1, description="share of the next-token loss; the rest is KL divergence")
    recompute: Literal["auto", "always", "never"] = Field(
        "auto",
        description="compute blocks again on the way back instead of keeping what they computed, which changes no result; auto: "
        "where keeping it would take more than half of the free memory",
    )
    teacher: str | None = Field(
        None, description="folder that keeps the teacher's last hidden states for other runs with the same model and text"
    )

    @model_validator(mode="after")
    def _levels_or_scales(self) -> "EndToEnd":
        if {"levels", "scales"} <= set(self.trained):
            raise ValueError("train: levels and scales: a scale moves its levels; name one of them")
        if {"weights", "scales"} <= set(self.trained):
            raise ValueError("train: weights and scales: where codes move, so do single levels; name levels instead of scales")
        return self


class DistillEndToEnd(EndToEnd):
    """The end-to-end phase of stage 2."""

    train: list[Literal["weights", "levels", "scales", "norms"]] = Field(
        ["levels", "norms"],
        min_length=1,
        description="what is trained; weights: codes, through latents; scales: all levels of a group by one factor, of a row "
        "with ptq.level_bits 2, where scales stand for levels by default",
    )


class ActEndToEnd(EndToEnd):
    """The end-to-end phase of stage 3: activations, keys and values are quantized."""

    train: list[Literal["weights", "levels", "scales", "norms", "clip_factors", "knees"]] = Field(
        ["levels", "norms", "clip_factors"],
        min_length=1,
        description="what is trained; weights: codes, through latents; scales: all levels of a group by one factor, of a row "
        "with ptq.level_bits 2, where scales stand for levels by default",
    )
    lr_clip_factors: float = Field(1e-3, gt=0, le=1, description="AdamW rate of clipping factors, which lie in [0.1, 1]")
    lr_knees: float = Field(1e-2, gt=0, le=1, description="AdamW rate of the logarithm of coarse ratios, which place the knees")
    soft: float = Field(0.5, ge=0, lt=1, description="where knees are trained: share of the steps in which they are soft")
    soft_knee: SoftKnee = Field([1.0, 0.05], description="temperature of the soft knee at its first and last step, in fine steps")


class Distill(Training):
    """Stage 2: latent weights, levels and bitmaps trained block by block against the full-precision block."""

    parametrisation: Literal["nearest", "bitmap"] = Field(
        "nearest", description="nearest: the code is the level nearest to the latent weight; bitmap: the paper's relaxed bitmap"
    )
    train: list[Literal["weights", "levels", "bitmap"]] | None = Field(
        None, min_length=1, description="what is trained; default everything the parametrisation has"
    )
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None,
        description="decay of the running mean over steps of what is trained, which an epoch is scored and kept as; null: the "
        "state of the last step",
    )
    lr_bitmap: float = Field(1e-2, gt=0, le=1, description="AdamW rate of the relaxed bitmap, which lies in [0, 1]")
    polarise: float = Field(0.01, ge=0, le=1e6, description="lambda of the regulariser 1 - |2 G - 1|^beta; grows from 0 to this")
    polarise_beta: Annotated[list[Annotated[float, Field(ge=1, le=100)]], Field(min_length=2, max_length=2)] = Field(
        [2.0, 2.0], description="beta at the first and at the last step"
    )
    end_to_end: DistillEndToEnd | None = Field(None, description="an end-to-end phase after it; default none")

    @property
    def trained(self) -> tuple[str, ...]:
        """Kinds of parameters that are trained."""
        every = ("weights", "levels", "bitmap") if self.parametrisation == "bitmap" else ("weights", "levels")
        return tuple(self.train) if self.train is not None else every

    @model_validator(mode="after")
    def _has_what_is_trained(self) -> "Distill":
        if self.parametrisation == "nearest" and "bitmap" in self.trained:
            raise ValueError("train: parametrisation `nearest` has no bitmap; train weights and levels, or use `bitmap`")
        return self


Bits = Annotated[int, Field(ge=3, le=8)]


class ActCalib(Training):
    """Stage 3: quantizers of activations, keys and values, and the levels behind them, trained block by block."""

    parent: ParentName | None = Field(
        None,
        description="checkpoint to go on from; default the last one that distill makes with this recipe; ptq: stage 2 is skipped",
    )
    sequences: Annotated[int, Field(ge=2, le=COUNT)] | None = Field(
        None, description="sequences of data.training to use, spread evenly over them; default all"
    )
    bits: Bits = Field(4, description="bits of an activation")
    kv_bits: Bits = Field(4, description="bits of a key's or value's entry, in the cache and in every other pass")
    granularity: Literal["group", "token"] = Field(
        "group", description="what shares a step: group_size inputs of a token, or all inputs of a token"
    )
    group_size: GroupSize | None = Field(
        None,
        description="inputs that share a step; default ptq.group_size; with ptq.level_bits 2 any, by default at least 32",
    )
    form: Literal["knee", "uniform"] = Field(
        "knee", description="knee: static tables of fine and coarse levels; uniform: equal steps and a dynamic zero"
    )
    kv_form: Literal["knee", "uniform"] = Field("knee", description="the same for keys and values")
    tables: int = Field(2, ge=1, le=2, description="tables of a knee quantizer; with 2 each token and group takes the better")
    key_centre: Literal["mean", "none"] = Field(
        "none",
        description="mean: keys are quantized without the mean of their head, which no softmax sees, so that nothing adds it "
        "again; attention with a soft cap or sinks does without it. What `lbllm init` writes; none is what earlier versions did",
    )
    train: list[Literal["weights", "levels", "clip_factors", "knees"]] = Field(
        ["levels", "clip_factors", "knees"],
        min_length=1,
        description="what is trained; with weights, codes are trained as well (weights and activations jointly)",
    )
    epochs: int = Field(1, ge=0, le=100, description="passes over the training sequences; 0 keeps the quantizers as fitted")
    lr_levels: float = Field(5e-3, gt=0, le=1, description="AdamW rate of levels, relative to the RMS of the linear's weights")
    lr_clip_factors: float = Field(5e-3, gt=0, le=1, description="AdamW rate of clipping factors, which lie in [0.1, 1]")
    lr_knees: float = Field(1e-2, gt=0, le=1, description="AdamW rate of the logarithm of coarse ratios, which place the knees")
    soft: float = Field(0.5, ge=0, lt=1, description="share of the steps with soft knees; after it the deployed form is trained")
    temperature: SoftKnee = Field([1.0, 0.05], description="of the soft knee at its first and last step, in fine steps")
    end_to_end: ActEndToEnd | None = Field(None, description="an end-to-end phase after it; default none")

    @property
    def subset(self) -> int | None:
        """See `sequences`."""
        return self.sequences
