"""From a recipe to a checked plan: everything that can be checked is, before a weight is read or a byte written."""

import errno
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lbllm_cli import __version__
from lbllm_cli.core import files
from lbllm_cli.core.errors import UsageError
from lbllm_cli.data import sources as text_sources
from lbllm_cli.data import tokens as data
from lbllm_cli.models.model import SourceModel, choose_device, open_model, open_tokenizer
from lbllm_cli.pipeline import overlaps
from lbllm_cli.pipeline.checkpoint import Checkpoint, flatten
from lbllm_cli.pipeline.stage_record import PARENT
from lbllm_cli.recipe.base import Source
from lbllm_cli.recipe.schema import Ptq, Recipe, TokenSet
from lbllm_cli.recipe.training import EndToEnd, Schedule

# Which part of the recipe says what a stage reads.
DATA = {
    "ptq": "data.calibration",
    "distill": "data.training",
    "distill-e2e": "distill.end_to_end",
    "act-calib": "data.training",
    "act-calib-e2e": "act_calib.end_to_end",
}
# Of another stage's sampled text nothing can be left out: another seed gives other text.
_SAMPLES = {"distill-e2e": 1, "act-calib-e2e": 2}
# The longest path below the output folder.
_LONGEST = "act-calib-e2e.partial/streams/unfinished_quantized_000.bin.tmp"


@dataclass(frozen=True)
class Plan:
    """A checked recipe. tokenizer: None only where `weights=False` met a folder without one."""

    recipe: Recipe
    output: Path
    model: SourceModel
    tokenizer: Any
    _tokens: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def vocab(self) -> int:
        """Size of the model's vocabulary."""
        return int(self.model.config.vocab_size)

    def settings(self, stage: str) -> Schedule | Ptq:
        """The recipe's section for a stage."""
        recipe = self.recipe
        sections: dict[str, Schedule | Ptq | None] = {
            "ptq": recipe.ptq,
            "distill": recipe.distill,
            "distill-e2e": recipe.distill.end_to_end,
            "act-calib": recipe.act_calib,
            "act-calib-e2e": recipe.act_calib.end_to_end,
        }
        found = sections[stage]
        if found is None:
            raise UsageError(f"the recipe has no {DATA[stage]}, which made the {stage} checkpoint in {self.output}; add it")
        return found

    def token_set(self, stage: str) -> TokenSet:
        """What a stage reads: data.calibration or data.training, or in an end-to-end phase as much as it says."""
        training, settings = self.recipe.data.training, self.settings(stage)
        if isinstance(settings, EndToEnd):
            source = training.source if settings.source is None else settings.source
            return training.model_copy(update={"source": source, "sequences": settings.sequences})
        return self.recipe.data.calibration if stage == "ptq" else training

    def _taken(self, stage: str) -> list[tuple[int, ...]]:
        """What other sets of the same sources have, where a stage takes fresh sequences; see `data.training_tokens`."""
        own = self.recipe.distill.end_to_end if stage == "distill-e2e" else self.recipe.act_calib.end_to_end
        if stage not in _SAMPLES or own is None:
            return []
        if own.skip is not None:
            return [(own.skip,)]
        source = self.token_set(stage).source
        taken: list[tuple[int, ...]] = []
        if self.recipe.data.training.source == source:
            taken.append((self.recipe.data.training.sequences,))
        earlier = self.recipe.distill.end_to_end if stage == "act-calib-e2e" else None
        if earlier is not None and self.token_set("distill-e2e").source == source:
            # The first one that it reads follows what it passes over itself.
            taken += [(*passed, earlier.sequences) for passed in self._taken("distill-e2e") or [()]]
        return taken

    def generates(self, stage: str) -> bool:
        """Whether a stage's text is sampled from the model, which writes its cache into the output folder."""
        return any(item.source == "generate:" for item in self.token_set(stage).source)

    def stage_tokens(self, stage: str) -> Tensor:
        """int64 [sequences, length] that a stage reads; of the stages before it, which are compared as well, read once."""
        if stage not in self._tokens:
            self._tokens[stage] = self._read_tokens(stage)
        return self._tokens[stage]

    def _read_tokens(self, stage: str) -> Tensor:
        seed, taken = self.recipe.runtime.seed, self._taken(stage)

        def sample(item: Source, rows: int, length: int) -> Tensor:
            from lbllm_cli.models.sampling import cached_sample

            return cached_sample(
                self.model, self.tokenizer, self.output, item, rows, length, seed + (_SAMPLES.get(stage, 0) << 20)
            )

        tokens = data.training_tokens(self.token_set(stage), self.tokenizer, self.vocab, seed, sample, DATA[stage], taken)
        count = self.recipe.act_calib.sequences
        if stage != "act-calib" or count is None:
            return tokens
        # Spread, for the sequences may be ordered by source.
        return tokens[torch.linspace(0, len(tokens) - 1, count).round().long()]

    def activation_parent(self) -> str:
        """The stage that act-calib goes on from."""
        last = "distill" if self.recipe.distill.end_to_end is None else "distill-e2e"
        return self.recipe.act_calib.parent or last

    def evaluation(self) -> dict[str, Tensor]:
        """name -> int64 [segments, length] of data.evaluation."""
        return {spec.name: data.evaluation_tokens(spec, self.tokenizer, self.vocab) for spec in self.recipe.data.evaluation}

    def inputs(self, stage: str, tokens: Tensor | None, parent: Checkpoint | None = None) -> dict[str, Any]:
        """Everything a stage's checkpoint depends on, by recipe key: its fingerprint, and what a refusal lists.

        tokens: see `stage_tokens`; None leaves them out. parent: what the stage goes on from, by its bytes.
        """
        settings = self.settings(stage)
        section = DATA[stage] if isinstance(settings, EndToEnd) else stage.replace("-", "_")
        # The tokens themselves, not where they came from: a text that moved is still the same text.
        text = {}
        if tokens is not None:
            text = {f"{DATA[stage]}.tokens": f"{tokens.shape[0]} x {tokens.shape[1]}, {data.tokens_hash(tokens)}"}
        # The text is there by its tokens; a phase after it, and where states are kept, are not what a checkpoint depends on.
        own = settings.model_dump(mode="json", exclude={"end_to_end", "source", "skip", "teacher", "recompute"})
        if stage == "act-calib":
            own["parent"] = self.activation_parent()
        return {
            "stage": stage,
            "model.files": self.model.identity(),
            "model.dtype": self.recipe.model.dtype,
            "runtime.seed": self.recipe.runtime.seed,
            **text,
            **flatten(own, section),
            **({} if parent is None else {PARENT: parent.content}),
        }


def prepare(recipe: Recipe, weights: bool = True, calibrate: bool = False, train: bool = False, evaluate: bool = False) -> Plan:
    """Opens model and tokenizer and checks the sources that will be read.

    weights: False accepts a folder that holds only config.json. calibrate, train, evaluate: which parts of `data` must be usable.
    Raises UsageError with every problem found.
    """
    problems: list[str] = []

    def attempt(step: Callable[[], Any]) -> Any:
        try:
            return step()
        except UsageError as error:
            problems.append(str(error))

    device = attempt(lambda: choose_device(recipe.runtime.device))
    model = attempt(lambda: open_model(recipe.model, device or torch.device("cpu"), weights))
    output = attempt(lambda: output_folder(recipe))
    if output is not None:
        attempt(lambda: _check_output(output, model))
        attempt(lambda: overlaps.check_overlaps(recipe, output, None if model is None else model.folder))
    read = {"calibration": recipe.data.calibration} if calibrate else {}
    read |= {"training": recipe.data.training} if train else {}
    for tokens in read.values():
        for item in text_sources.expand(tokens.source):
            attempt(partial(text_sources.check, item, evaluating=False))
    for phase in (recipe.distill.end_to_end, recipe.act_calib.end_to_end):
        for item in text_sources.expand(phase.source) if train and phase is not None and phase.source else ():
            attempt(partial(text_sources.check, item, evaluating=False))
    if evaluate:
        for spec in recipe.data.evaluation:
            for item in text_sources.expand(spec.source):
                attempt(partial(text_sources.check, item, evaluating=True))
    tokenizer = None
    if model is not None and (model.entries or weights):
        tokenizer = attempt(lambda: open_tokenizer(recipe.model, model.folder))
        lengths = {f"data.{key}.length": tokens.length for key, tokens in read.items()}
        lengths |= {f"data.evaluation {spec.name}, length": spec.length for spec in recipe.data.evaluation}
        problems += _beyond_positions(lengths, model)
    if train and model is not None and model.dtype == torch.float16:
        # Gradients of float16 activations underflow; scaling the loss would only hide it.
        problems.append("training in float16 loses gradients; set model.dtype: bfloat16 (or float32), for every stage")
    if problems:
        raise UsageError("\n".join(problems))
    return Plan(recipe, output, model, tokenizer)


def _beyond_positions(lengths: dict[str, int], model: SourceModel) -> list[str]:
    limit = int(getattr(model.config, "max_position_embeddings", 0) or 0)
    return [
        f"{key} is {length}, the model has {limit} positions; lower it"
        for key, length in lengths.items()
        if limit and length > limit
    ]


def output_folder(recipe: Recipe) -> Path:
    """output.dir, in which every name that lbllm writes can be had. Raises UsageError."""
    output = files.user_path(recipe.output.dir, "output.dir")
    try:
        os.stat(output.absolute() / _LONGEST)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            shown = f"{recipe.output.dir[:80]}..."
            raise UsageError(f"output.dir {shown} is too long for the files in it; give a shorter one") from None
    return output


def _check_output(output: Path, model: SourceModel | None) -> None:
    if output.exists() and not output.is_dir():
        raise UsageError(f"output.dir {output} is a file; choose a folder")
    if model is not None and output.exists() and output.resolve() == model.folder.resolve():
        raise UsageError(f"output.dir {output} is the model's own folder; choose another")
    overlaps.check_places(output)
    existing = output.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UsageError(f"output.dir {output} cannot be written: {existing} is not a writable folder")


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, device and threads of this process; written beside a checkpoint, outside the promise of equal bytes."""
    import safetensors
    import transformers

    return {
        "lbllm": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
    }
