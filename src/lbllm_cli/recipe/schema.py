"""The recipe: one strict YAML for all stages. Every default lives here; every field says meaning, unit and range."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lbllm_cli.core.splits import held_out_rows
from lbllm_cli.recipe.base import GroupSize, Positive, Section, StageSection
from lbllm_cli.recipe.stages import STAGES, TABLE, ExportedName, FormatName, MeasuredName, StageSpec
from lbllm_cli.recipe.text import Data, Source, check_size
from lbllm_cli.recipe.training import ActCalib, ActEndToEnd, Distill, DistillEndToEnd, EndToEnd, Schedule

# Rounds of stage 1 where levels have 2 bits: of one, three and six the last left the least error.
_TABLE_ROUNDS = 6
# And rates at which their phases train scales of rows, as on SmolLM2-135M: after distill half and twice as much were worse.
_SCALE_RATES = {"distill": 6e-3, "act_calib": 4e-3}


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
    seed: int = Field(0, ge=0, le=2**63 - 1, description="chooses windows of text and their order, and samples text")
    streams: Literal["auto", "device", "ram", "disk"] = Field(
        "auto",
        description="hidden states between blocks; auto: the GPU's memory where they fit beside the work, else RAM while they "
        "need less than half of what is free; device: the GPU's memory, of a CPU its RAM",
    )
    batch_size: Positive = Field(4, description="sequences in one forward pass of a block")
    save_minutes: float = Field(10, ge=0, le=1e6, description="a block's unfinished training is saved this often")


class Ptq(StageSection):
    """Stage 1: Hessian-weighted EM with error compensation, then refinement under the full Hessian."""

    group_size: GroupSize = Field(128, description="inputs that share four levels; a multiple of 16")
    group_sizes: dict[str, GroupSize] = Field(
        {},
        description="larger groups of some linears, by a pattern of their names: layers.3.mlp.* or layers.*.mlp.down_proj; of "
        "several that match, the smallest counts; needs level_bits 2",
    )
    level_bits: Literal[8, 4, 2] = Field(
        8, description="bits of a stored level; a group has four. 2: out of a table, with one scale a row, for small groups"
    )
    levels: Literal["em", "quantile"] = Field("em", description="how a group's levels are fitted before coding")
    em_iterations: int = Field(20, ge=1, le=200, description="most EM iterations per group")
    importance: Literal["inverse_hessian", "hessian_diagonal"] = Field(
        "inverse_hessian", description="EM weight of a column: 1/U_jj^2 of the inverse Hessian's factor, or H_jj"
    )
    damping: float = Field(0.01, gt=0, le=10, description="added to H's diagonal, in units of its mean")
    compensation: bool = Field(True, description="push each column's error onto the columns not yet coded")
    refit: bool = Field(True, description="refit levels in closed form under the full Hessian")
    code_descent: bool = Field(True, description="coordinate descent over the codes under the full Hessian")
    rounds: int = Field(
        1,
        ge=0,
        le=50,
        description="code descent, then refit and code descent this many times; 0: neither; with level_bits 2 by default 6",
    )
    sequential: bool = Field(True, description="linears of a block see the already binarized linears before them")
    asymmetric: Literal["auto"] | Annotated[float, Field(ge=0, le=1)] = Field(
        "auto", description="strength of the asymmetric target; auto: chosen per linear on held-out sequences; 0: off"
    )
    held_out: float = Field(0.25, gt=0, lt=1, description="share of the sequences that choose `asymmetric: auto`")

    @model_validator(mode="after")
    def _own_sizes_of_table_levels(self) -> "Ptq":
        if self.group_sizes and self.level_bits != 2:
            # There a step of 4 bits stands for a group of weights, and all inputs have steps of one size.
            raise ValueError(f"group_sizes: needs level_bits 2, got {self.level_bits}; leave it out, or give '{{}}'")
        if smaller := [name for name, size in self.group_sizes.items() if size < self.group_size]:
            raise ValueError(f"group_sizes: {smaller[0]} has groups smaller than group_size, {self.group_size}; lower group_size")
        return self


class Eval(Section):
    """What `lbllm eval` measures."""

    checkpoints: list[MeasuredName] | None = Field(
        None, min_length=1, description="default: base and every complete stage; export: the exported folder, as others load it"
    )
    tasks: list[Annotated[str, Field(min_length=1)]] = Field(
        [],
        description="lm-eval tasks: commonsense, mmlu, gsm8k, builtin:continuation, builtin:last_word, builtin:retrieval, "
        "a task's YAML file, or any name that lm-eval knows",
    )
    num_fewshot: int | None = Field(
        None, ge=0, le=100, description="examples in context; default commonsense 0, mmlu 5, gsm8k 5, others the task's own"
    )
    limit: Positive | Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="documents of each task, below 1 a share of them; default all"
    )
    batch_size: Positive = Field(8, description="sequences in one forward pass of a task")


class Export(Section):
    """What `lbllm export` writes."""

    checkpoint: ExportedName = Field("latest", description="latest: the last complete stage")
    format: FormatName = Field(
        "packed",
        description="packed: 2-bit codes; dense: a plain folder; compressed-tensors: 8 bits a weight, which transformers "
        "loads without lbllm; gguf: 8.5 bits a weight, for llama.cpp",
    )
    head_bits: Literal[16, 8] = Field(
        16,
        description="of embedding and head in a packed export; other formats have them as the source has. 8: an integer a weight "
        "and a scale a row, half the bytes; what `lbllm init` writes. 16: as the source has",
    )
    shard_gb: float = Field(5.0, ge=1e-6, le=1e6, description="largest weight file, in units of 10^9 bytes; held in RAM once")


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

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_table_levels(cls, values: Any) -> Any:
        """Where levels have 2 bits and nothing is said, stage 1 goes on for longer, and phases train scales in place of levels,
        at a higher rate.

        Out of a table the levels of one group after another are chosen, which one round does not end; trained end to end they
        gain little.
        """
        ptq = values.get("ptq") if isinstance(values, dict) else None
        if not isinstance(ptq, dict) or ptq.get("level_bits") != 2:
            return values
        found = {**values, "ptq": {"rounds": _TABLE_ROUNDS, **ptq}}
        for name, phase in (("distill", DistillEndToEnd), ("act_calib", ActEndToEnd)):
            section = values.get(name)
            if isinstance(section, dict) and isinstance(section.get("end_to_end"), dict):
                train = ["scales" if kind == "levels" else kind for kind in phase.model_fields["train"].default]
                said = {"train": train, **section["end_to_end"]}
                rate = {"lr_levels": _SCALE_RATES[name]} if isinstance(said["train"], list) and "scales" in said["train"] else {}
                found[name] = {**section, "end_to_end": {**rate, **said}}
        return found

    def section(self, key: str) -> Any:
        """What is under a dotted key, None where a section on the way is left out: "distill.end_to_end"."""
        value: Any = self
        for part in key.split("."):
            value = None if value is None else getattr(value, part)
        return value

    @property
    def stages(self) -> list[StageSpec]:
        """Stages that the recipe has, in pipeline order."""
        return [spec for spec in TABLE if self.section(spec.section) is not None]

    def parent(self, spec: StageSpec) -> StageSpec | None:
        """The stage that one goes on from: the one that its section names, else the first of its parents that the recipe has."""
        named = getattr(self.section(spec.section), "parent", None)
        present = [STAGES[name] for name in spec.parents if STAGES[name] in self.stages]
        return STAGES[named] if named else next(iter(present), None)

    @model_validator(mode="after")
    def _parents_are_made(self) -> "Recipe":
        for spec in self.stages:
            parent = self.parent(spec)
            if parent is not None and parent not in self.stages:
                raise ValueError(
                    f"{spec.section}.parent: {parent} is what {parent.section} makes, which the recipe does not have; add "
                    f"{parent.section}, for example {parent.section}.sequences=128, or name another parent"
                )
        return self

    @model_validator(mode="after")
    def _groups_of_steps(self) -> "Recipe":
        size = self.act_calib.group_size
        if self.ptq.level_bits != 2 and size not in (None, self.ptq.group_size):
            raise ValueError(
                f"act_calib.group_size: {size}, and ptq.group_size {self.ptq.group_size}: weights and inputs share their groups "
                "where levels have 8 or 4 bits; leave it out"
            )
        return self

    @property
    def step_group(self) -> int:
        """Inputs of a token that share a step."""
        least = 32 if self.ptq.level_bits == 2 else 0
        return self.act_calib.group_size or max(least, self.ptq.group_size)

    @property
    def texts(self) -> dict[str, list[Source]]:
        """The sources that it names, by what messages call the set that has them."""
        data, phases = self.data, self.end_to_end.items()
        return {
            **{"data.calibration": data.calibration.source, "data.training": data.training.source},
            **{spec.text: phase.source for spec, phase in phases if phase.source is not None},
            **{item.key: item.source for item in data.evaluation},
        }

    @property
    def end_to_end(self) -> dict[StageSpec, EndToEnd]:
        """Settings of the end-to-end phases that the recipe has."""
        return {spec: found for spec in TABLE if spec.end_to_end and (found := self.section(spec.section)) is not None}

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
        phases: list[tuple[str, Schedule, int]] = [("distill", self.distill, rows), ("act_calib", self.act_calib, wanted)]
        for spec, phase in self.end_to_end.items():
            phases.append((spec.section, phase, phase.sequences))
            check_size(f"{spec.section}.sequences", phase.sequences, self.data.training.length)
        for section, settings, count in phases:
            left = count - held_out_rows(count, settings.held_out)
            if settings.batch_size > left:
                raise ValueError(
                    f"{section}.batch_size: {settings.batch_size} sequences in a step, but {count} sequences leave {left} beside "
                    f"those that {section}.held_out takes; lower it or raise the number of sequences"
                )
        return self
