"""The recipe: one strict YAML for all stages. Every default lives here; every field says meaning, unit and range."""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from lbllm_cli.held_out import held_out_rows

Positive = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]


class Section(BaseModel):
    """Base of every section: unknown keys are errors, numbers are not read from strings, nothing changes later."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Model(Section):
    """The full-precision model."""

    path: str = Field(min_length=1, description="Hugging Face id or local folder with config.json and safetensors")
    revision: str | None = Field(None, description="branch, tag or commit of a Hugging Face id")
    dtype: Literal["source", "float32", "bfloat16", "float16"] = Field(
        "source",
        description="dtype blocks are computed in; source: the checkpoint's own on a GPU, float32 on a CPU "
        "(every 16-bit value is exact in float32, and CPUs without bf16 units are slower in 16 bits)",
    )
    trust_remote_code: bool = Field(False, description="allow Python code of the model folder's tokenizer to run")


class Output(Section):
    """Where everything is written."""

    dir: str = Field(min_length=1, description="folder; <dir>/<stage>/ is a stage's checkpoint")


class Runtime(Section):
    """How to run; none of it changes what a checkpoint is, except `seed`."""

    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto: the first GPU, else the CPU")
    seed: int = Field(0, ge=0, description="chooses calibration windows and samples text")
    streams: Literal["auto", "ram", "disk"] = Field(
        "auto", description="hidden states between blocks; auto: RAM while they need less than half of what is free"
    )
    batch_size: Positive = Field(4, description="sequences in one forward pass of a block")
    save_minutes: float = Field(10, ge=0, description="a block's unfinished training is saved this often")


class Source(Section):
    """One source of text or tokens; `source` alone may be written as a plain string."""

    source: str = Field(min_length=1, description="builtin:..., generate:, hub:NAME, a preset, or a path")
    weight: float = Field(1.0, gt=0, description="share of the sequences when several sources are mixed")
    text_key: str = Field("text", description="field of a record that holds the text")
    messages_key: str | None = Field(None, description="field that holds chat messages; the chat template renders them")
    split: str | None = Field(None, description="split of a dataset; default train, for evaluation test")
    config: str | None = Field(None, description="configuration name of a hub dataset")
    path: str | None = Field(None, description="local file with a preset's schema, instead of the hub")
    temperature: float = Field(1.0, gt=0, le=2, description="generate: sampling temperature")


def _as_sources(value: object) -> object:
    """A name, a mapping or a list of either: always a list of mappings afterwards."""
    items = value if isinstance(value, list) else [value]
    return [{"source": item} if isinstance(item, str) else item for item in items]


Sources = Annotated[list[Source], BeforeValidator(_as_sources), Field(min_length=1)]


class TokenSet(Section):
    """Tokens to calibrate or train on."""

    source: Sources = Field([Source(source="builtin:calibration")], description="one source or a mixture")
    sequences: Positive = Field(32, description="sequences of `length` tokens")
    length: int = Field(512, ge=8, description="tokens in a sequence")
    bos: bool = Field(False, description="start every sequence with the tokenizer's BOS")


class EvaluationSet(Section):
    """One text to measure perplexity on."""

    name: Name
    source: Sources
    length: int = Field(1024, ge=8, description="tokens in a segment")
    segments: Positive | None = Field(None, description="segments from the start of the text; default all")
    bos: bool = Field(False, description="start every segment with the tokenizer's BOS")


def _builtin_evaluation() -> list[EvaluationSet]:
    return [
        EvaluationSet(name=style, source=[Source(source=f"builtin:evaluation/{style}")], length=1024, segments=40)
        for style in ("novels", "technical", "modern")
    ]


class Data(Section):
    """Text for every stage."""

    calibration: TokenSet = Field(default_factory=TokenSet)
    training: TokenSet = Field(default_factory=lambda: TokenSet(sequences=256))
    evaluation: list[EvaluationSet] = Field(default_factory=_builtin_evaluation, min_length=1)

    @field_validator("evaluation")
    @classmethod
    def _names_differ(cls, value: list[EvaluationSet]) -> list[EvaluationSet]:
        names = [item.name for item in value]
        if len(set(names)) != len(names):
            raise ValueError(f"evaluation names must differ, got {', '.join(names)}")
        return value


class Ptq(Section):
    """Stage 1: Hessian-weighted EM with error compensation, then refinement under the full Hessian."""

    group_size: int = Field(128, ge=16, le=4096, description="inputs that share four levels; a multiple of 16")
    levels: Literal["em", "quantile"] = Field("em", description="how a group's levels are fitted before coding")
    em_iterations: int = Field(20, ge=1, le=200, description="most EM iterations per group")
    importance: Literal["inverse_hessian", "hessian_diagonal"] = Field(
        "inverse_hessian", description="EM weight of a column: 1/U_jj^2 of the inverse Hessian's factor, or H_jj"
    )
    damping: float = Field(0.01, gt=0, le=10, description="added to H's diagonal, in units of its mean")
    compensation: bool = Field(True, description="push each column's error onto the columns not yet coded")
    refit: bool = Field(True, description="refit levels in closed form under the full Hessian")
    code_descent: bool = Field(True, description="coordinate descent over the codes under the full Hessian")
    rounds: int = Field(1, ge=0, le=50, description="code descent, then refit and code descent this many times; 0: neither")
    sequential: bool = Field(True, description="linears of a block see the already binarized linears before them")
    asymmetric: Literal["auto"] | Annotated[float, Field(ge=0, le=1)] = Field(
        "auto", description="strength of the asymmetric target; auto: chosen per linear on held-out sequences; 0: off"
    )
    held_out: float = Field(0.25, gt=0, lt=1, description="share of the sequences that choose `asymmetric: auto`")

    @field_validator("group_size")
    @classmethod
    def _multiple_of_16(cls, value: int) -> int:
        if value % 16:
            raise ValueError(f"must be a multiple of 16, got {value}")
        return value


class Training(Section):
    """What the stages that train a block have in common."""

    epochs: int = Field(2, ge=0, le=100, description="passes over the training sequences; 0 trains nothing")
    batch_size: Positive = Field(2, description="sequences in an optimizer step")
    micro_batch_size: Positive = Field(
        4, description="most sequences in one forward and backward pass; gradients add up to a step"
    )
    lr_weights: float = Field(2e-2, gt=0, le=1, description="AdamW rate of latents, relative to the RMS of the linear's weights")
    lr_levels: float = Field(1e-2, gt=0, le=1, description="AdamW rate of levels, relative to the same RMS")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps in which rates rise; then they fall as a cosine")
    clip: float = Field(2.0, gt=0, description="largest gradient norm, in units of its running mean")
    loss: Literal["robust", "plain", "mixed"] = Field(
        "robust",
        description="plain: squared error over all tokens; robust: of tokens far off, beyond 100 times the usual squared error, "
        "the distance counts instead of its square; mixed: half of plain over ordinary tokens alone",
    )
    latent_margin: float = Field(
        0.2, ge=0, le=1, description="how far inside its code's cell a latent starts at least, 1: on its level"
    )
    dampening: float = Field(
        0.003, ge=0, lt=1, description="share of the way to its level that a latent is pulled in every step, against chatter"
    )
    held_out: float = Field(0.0625, gt=0, lt=1, description="share of the sequences that choose the best epoch")
    max_skipped: int = Field(10, ge=0, description="steps of a block that may be skipped for not being finite")


def _each_once(kinds: tuple[str, ...]) -> None:
    if len(set(kinds)) != len(kinds):
        raise ValueError(f"train: {', '.join(kinds)} names a kind twice")


class Distill(Training):
    """Stage 2: latent weights, levels and bitmaps trained block by block against the full-precision block."""

    parametrisation: Literal["nearest", "bitmap"] = Field(
        "nearest", description="nearest: the code is the level nearest to the latent weight; bitmap: the paper's relaxed bitmap"
    )
    train: list[Literal["weights", "levels", "bitmap"]] | None = Field(
        None, min_length=1, description="what is trained; default everything the parametrisation has"
    )
    lr_bitmap: float = Field(1e-2, gt=0, le=1, description="AdamW rate of the relaxed bitmap, which lies in [0, 1]")
    polarise: float = Field(0.01, ge=0, description="lambda of the regulariser 1 - |2 G - 1|^beta; grows from 0 to this")
    polarise_beta: Annotated[list[Annotated[float, Field(ge=1, le=100)]], Field(min_length=2, max_length=2)] = Field(
        [2.0, 2.0], description="beta at the first and at the last step"
    )

    @property
    def trained(self) -> tuple[str, ...]:
        """Kinds of parameters that are trained."""
        every = ("weights", "levels", "bitmap") if self.parametrisation == "bitmap" else ("weights", "levels")
        return tuple(self.train) if self.train is not None else every

    @model_validator(mode="after")
    def _has_what_is_trained(self) -> "Distill":
        if self.parametrisation == "nearest" and "bitmap" in self.trained:
            raise ValueError("train: parametrisation `nearest` has no bitmap; train weights and levels, or use `bitmap`")
        _each_once(self.trained)
        return self


Bits = Annotated[int, Field(ge=3, le=8)]


class ActCalib(Training):
    """Stage 3: quantizers of activations, keys and values, and the levels behind them, trained block by block."""

    parent: Literal["distill", "ptq"] = Field("distill", description="checkpoint to go on from; ptq: stage 2 is skipped")
    sequences: Annotated[int, Field(ge=2)] | None = Field(
        None, description="sequences of data.training to use, spread evenly over them; default all"
    )
    bits: Bits = Field(4, description="bits of an activation")
    kv_bits: Bits = Field(4, description="bits of a key's or value's entry, in the cache and in every other pass")
    granularity: Literal["group", "token"] = Field(
        "group", description="what shares a step: ptq.group_size inputs of a token, or all inputs of a token"
    )
    form: Literal["knee", "uniform"] = Field(
        "knee", description="knee: static tables of fine and coarse levels; uniform: equal steps and a dynamic zero"
    )
    kv_form: Literal["knee", "uniform"] = Field("knee", description="the same for keys and values")
    tables: int = Field(2, ge=1, le=2, description="tables of a knee quantizer; with 2 each token and group takes the better")
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
    temperature: Annotated[list[Annotated[float, Field(gt=0, le=10)]], Field(min_length=2, max_length=2)] = Field(
        [1.0, 0.05], description="of the soft knee at its first and last step, in fine steps"
    )

    @property
    def trained(self) -> tuple[str, ...]:
        """Kinds of parameters that are trained."""
        return tuple(self.train)

    @model_validator(mode="after")
    def _kinds_differ(self) -> "ActCalib":
        _each_once(self.trained)
        return self


class Eval(Section):
    """What `lbllm eval` measures."""

    checkpoints: list[Literal["base", "ptq", "distill", "act-calib", "export"]] | None = Field(
        None, min_length=1, description="default: base and every complete stage; export: the exported folder, as others load it"
    )
    tasks: list[Annotated[str, Field(min_length=1)]] = Field(
        [],
        description="lm-eval tasks: commonsense, mmlu, gsm8k, builtin:continuation, builtin:last_word, a task's YAML file, or "
        "any name that lm-eval knows",
    )
    num_fewshot: int | None = Field(
        None, ge=0, le=100, description="examples in context; default commonsense 0, mmlu 5, gsm8k 5, others the task's own"
    )
    limit: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="documents of each task, below 1 a share of them; default all"
    )
    batch_size: Positive = Field(8, description="sequences in one forward pass of a task")


class Export(Section):
    """What `lbllm export` writes."""

    checkpoint: Literal["latest", "ptq", "distill", "act-calib"] = Field("latest", description="latest: the last complete stage")
    format: Literal["packed", "dense"] = Field("packed", description="packed: 2-bit codes; dense: a plain folder")
    shard_gb: float = Field(5.0, gt=0, description="largest weight file, in units of 10^9 bytes; held in RAM once")


class Recipe(Section):
    """All stages of one run."""

    recipe_version: Literal[1] = Field(1, description="this schema; another number is refused")
    model: Model
    output: Output
    runtime: Runtime = Field(default_factory=Runtime)
    data: Data = Field(default_factory=Data)
    ptq: Ptq = Field(default_factory=Ptq)
    distill: Distill = Field(default_factory=Distill)
    act_calib: ActCalib = Field(default_factory=ActCalib)
    eval: Eval = Field(default_factory=Eval)
    export: Export = Field(default_factory=Export)

    @model_validator(mode="after")
    def _held_out_leaves_both_parts(self) -> "Recipe":
        rows = self.data.calibration.sequences
        if self.ptq.asymmetric == "auto" and rows < 2:
            raise ValueError(
                "data.calibration.sequences: `ptq.asymmetric: auto` holds sequences out and needs at least 2, got "
                f"{rows}; add sequences or set ptq.asymmetric to a number"
            )
        return self

    @model_validator(mode="after")
    def _training_fills_a_step(self) -> "Recipe":
        rows = self.data.training.sequences
        if rows < 2:
            raise ValueError(f"data.training.sequences: one is held out, so at least 2 are needed, got {rows}")
        wanted = self.act_calib.sequences or rows
        if wanted > rows:
            raise ValueError(f"act_calib.sequences: {wanted} of data.training.sequences, which are {rows}")
        for section, settings, count in (("distill", self.distill, rows), ("act_calib", self.act_calib, wanted)):
            left = count - held_out_rows(count, settings.held_out)
            if settings.batch_size > left:
                raise ValueError(
                    f"{section}.batch_size: {settings.batch_size} sequences in a step, but {count} sequences leave {left} beside "
                    f"those that {section}.held_out takes; lower it or raise data.training.sequences"
                )
        return self
