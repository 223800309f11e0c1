"""The table of stages: what each is called, which part of the recipe it reads, what it goes on from, who does its work.

Everything that has to know a stage reads this table: commands, plans, checkpoints, reports, `recipes/batch.mk`. The work itself
is in a package of its own, whose module `stage` is a `pipeline.work.StageWork`.
"""

from dataclasses import dataclass
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Literal, TypeAlias

Phase = Literal["blocks", "end-to-end"]
# What `eval` measures beside stages: the full-precision model, and the exported folder.
BASE, EXPORT = "base", "export"
USUAL_FORMAT = "packed"


@dataclass(frozen=True)
class StageSpec:
    """One stage.

    name: of its folder, in manifests, in recipes and results. command: of lbllm, which may run two stages, one a phase. section:
    of the recipe, its settings. text: of the recipe, what it reads. package: of lbllm_cli, where its work is. reads: keys of the
    section that its checkpoint depends on. parents: stages that it may go on from, the one that it prefers first; none: it starts
    from the source model. streams: hidden-state streams that are alive at once on disk, and in RAM. fresh: it takes sequences
    that no other text of the same sources holds; the number keeps what it samples apart from what others do.
    """

    name: str
    command: str
    section: str
    text: str
    package: str
    reads: tuple[str, ...]
    parents: tuple[str, ...] = ()
    streams: tuple[int, int] = (0, 0)
    phase: Phase = "blocks"
    fresh: int = 0

    @property
    def end_to_end(self) -> bool:
        """Whether it trains the whole model at once."""
        return self.phase == "end-to-end"

    @property
    def remake(self) -> str:
        """The command that replaces it, and not the stage before it that the same command makes."""
        only = f" --only {self.phase}" if self.end_to_end else ""
        return f"lbllm {self.command} --recipe ...{only} --force"

    @property
    def own_command(self) -> str:
        """The command, without `lbllm`, that makes it and no other stage."""
        shared = any(other.command == self.command and other is not self for other in TABLE)
        return f"{self.command} --only {self.phase}" if shared else self.command

    def __str__(self) -> str:
        return self.name


_SCHEDULE = ("epochs", "batch_size", "micro_batch_size", "warmup", "clip", "held_out", "max_skipped", "train")
_BLOCKS = (*_SCHEDULE, "lr_weights", "lr_levels", "loss", "channel_cap", "latent_margin", "dampening")
_LATENTS = ("lr_weights", "latent_margin", "dampening")
_END_TO_END = (*_SCHEDULE, "sequences", *_LATENTS, "lr_levels", "lr_norms", "temperature", "next_token")

TABLE = (
    StageSpec(
        "ptq", command="ptq", section="ptq", text="data.calibration", package="ptq", streams=(4, 3),
        reads=(
            "group_size", "group_sizes", "level_bits", "levels", "em_iterations", "importance", "damping", "compensation",
            "refit", "code_descent", "rounds", "sequential", "asymmetric", "held_out",
        ),
    ),
    StageSpec(
        "distill", command="distill", section="distill", text="data.training", package="distill", parents=("ptq",),
        streams=(4, 2),
        reads=(*_BLOCKS, "ema_decay", "parametrisation", "lr_bitmap", "polarise", "polarise_beta"),
    ),
    StageSpec(
        "distill-e2e", command="distill", phase="end-to-end", section="distill.end_to_end", text="distill.end_to_end",
        package="end_to_end", parents=("distill",), fresh=1, reads=_END_TO_END,
    ),
    StageSpec(
        "act-calib", command="act-calib", section="act_calib", text="data.training", package="act_calib",
        parents=("distill-e2e", "distill", "ptq"), streams=(4, 2),
        reads=(
            *_BLOCKS, "parent", "sequences", "bits", "kv_bits", "granularity", "group_size", "form", "kv_form", "tables",
            "key_centre", "lr_clip_factors", "lr_knees", "soft", "temperature",
        ),
    ),
    StageSpec(
        "act-calib-e2e", command="act-calib", phase="end-to-end", section="act_calib.end_to_end", text="act_calib.end_to_end",
        package="end_to_end", parents=("act-calib",), fresh=2,
        reads=(*_END_TO_END, "lr_clip_factors", "lr_knees", "soft", "soft_knee"),
    ),
)  # fmt: skip
STAGES = {spec.name: spec for spec in TABLE}


@dataclass(frozen=True)
class Command:
    """A command of lbllm that runs stages. text: its help. example: behind `--recipe` in its help."""

    text: str
    example: str


COMMANDS = {
    "ptq": Command(
        """Stage 1: binarize block by block, Hessian-weighted EM with error compensation.

        Interrupted runs resume; a finished one says "up to date".""",
        "ptq.group_size=64",
    ),
    "distill": Command(
        """Stage 2: train weights, their codes and levels block by block against the full-precision model.

        Goes on from the ptq checkpoint. With distill.end_to_end in the recipe an end-to-end phase trains levels, or scales where
        levels have 2 bits, and norms of the whole model against the full-precision model's predictions, into
        <output.dir>/distill-e2e/. Interrupted runs resume, in the middle of a block too; a finished one says "up to date".""",
        "data.training.sequences=64",
    ),
    "act-calib": Command(
        """Stage 3: quantize activations, keys and values to 4 bits; train the quantizers, and the levels behind them, block by
        block.

        Goes on from the last stage of distill, or from ptq's checkpoint with act_calib.parent=ptq. With act_calib.end_to_end in
        the recipe an end-to-end phase trains levels or scales, norms and quantizers of the whole model, into
        <output.dir>/act-calib-e2e/. Interrupted runs resume, in the middle of a block too; a finished one says "up to date".""",
        "act_calib.granularity=token",
    ),
}

# Keys that earlier versions did not have, with the value that does as these did. At it a key is no part of a fingerprint: what
# they made is still what the recipe says.
CAME_LATER = {
    "ptq.level_bits": 8,
    "act_calib.key_centre": "none",
    "act_calib.group_size": None,
    **{f"{section}.channel_cap": None for section in ("distill", "act_calib")},
    "distill.ema_decay": None,
    # Of phases whose codes are fixed they mean nothing.
    **{
        f"{section}.end_to_end.{key}": value
        for section in ("distill", "act_calib")
        for key, value in (("lr_weights", 5e-3), ("latent_margin", 0.2), ("dampening", 0.003))
    },
}

# Keys that no checkpoint depends on, or only through the tokens that its stage reads, and why. A section stands for all its keys.
NOT_IN_FINGERPRINT = {
    "recipe_version": "a recipe of another schema is refused",
    "model.path": "the model's files count, wherever they lie",
    "model.revision": "the model's files count, wherever they come from",
    "model.trust_remote_code": "the tokens count, whoever's code makes them",
    "output": "where a checkpoint lies does not change it",
    "runtime.device": "bytes are promised on one machine; another device is another machine",
    "runtime.streams": "where hidden states lie does not change them",
    "runtime.batch_size": "how many sequences pass at once does not change what is asked of them",
    "runtime.save_minutes": "a resumed run gives the same bytes",
    "data.evaluation": "evaluation trains nothing",
    "data.calibration": "its tokens count, not where they come from",
    "data.training": "its tokens count, not where they come from",
    "distill.end_to_end.source": "its tokens count, not where they come from",
    "distill.end_to_end.skip": "its tokens count",
    "distill.end_to_end.recompute": "memory for time, with the same bytes",
    "distill.end_to_end.teacher": "where states are kept does not change them",
    "act_calib.end_to_end.source": "its tokens count, not where they come from",
    "act_calib.end_to_end.skip": "its tokens count",
    "act_calib.end_to_end.recompute": "memory for time, with the same bytes",
    "act_calib.end_to_end.teacher": "where states are kept does not change them",
    "eval": "evaluation trains nothing",
    "export": "an export has a record of its own",
}


def _formats() -> tuple[str, ...]:
    """Names of the formats of exports, which are the files of a folder with hyphens, the usual one first."""
    names = sorted(item.name.replace("_", "-") for item in iter_modules([str(Path(__file__).parents[1] / "export" / "formats")]))
    return tuple(sorted(names, key=lambda name: name != USUAL_FORMAT))


if TYPE_CHECKING:
    # To a type checker, which cannot read a table, these are texts.
    StageName: TypeAlias = str
    ParentName: TypeAlias = str
    MeasuredName: TypeAlias = str
    ExportedName: TypeAlias = str
    FormatName: TypeAlias = str
else:
    StageName = Literal[tuple(STAGES)]
    ExportedName = Literal[("latest", *STAGES)]
    FormatName = Literal[_formats()]
    MeasuredName = Literal[(BASE, *STAGES, EXPORT)]
    ParentName = Literal[tuple(name for name in STAGES if name in STAGES["act-calib"].parents)]
