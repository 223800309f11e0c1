"""From a recipe to a checked plan: everything that can be checked is, before a weight is read or a byte written."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lbllm_cli.core.errors import UsageError
from lbllm_cli.data import sources, tokens
from lbllm_cli.format.group_sizes import linear_name, whole_groups
from lbllm_cli.format.weights import expected_bits
from lbllm_cli.models.model import SourceModel, open_model
from lbllm_cli.models.sampling import Listener, Sampling, Silent, cached_sample, kept_sample
from lbllm_cli.models.tokenizer import open_tokenizer
from lbllm_cli.parallel.group import ALONE, Group
from lbllm_cli.pipeline import output
from lbllm_cli.pipeline.devices import check_devices
from lbllm_cli.pipeline.world import World
from lbllm_cli.recipe.schema import Ptq, Recipe
from lbllm_cli.recipe.stages import TABLE, StageSpec
from lbllm_cli.recipe.text import Source, TokenSet
from lbllm_cli.recipe.training import EndToEnd, Schedule
from lbllm_cli.runtime.backend import choose_device

# Sets of text that follow each other: sources, sequences.
_Sets = list[tuple[list[Source], int]]


class _NotSampled(Exception):
    """Text that is wanted would have to be sampled."""


@dataclass(frozen=True)
class Plan:
    """A checked recipe. tokenizer: None only where `weights=False` met a folder without one. group: who runs it. asked: ranks
    that forecasts are for, where those are not the ones that run it.
    """

    recipe: Recipe
    output: Path
    model: SourceModel
    tokenizer: Any
    group: Group = ALONE
    asked: World | None = None
    _tokens: dict[str, Tensor | None] = field(default_factory=dict, repr=False, compare=False)

    @property
    def world(self) -> World:
        """Ranks that forecasts are for: of one of them."""
        return self.asked or World.of(self.group)

    @property
    def vocab(self) -> int:
        """Size of the model's vocabulary."""
        return int(self.model.config.vocab_size)

    def settings(self, spec: StageSpec) -> Schedule | Ptq:
        """The recipe's section for a stage. Raises UsageError where it has none."""
        found: Schedule | Ptq | None = self.recipe.section(spec.section)
        if found is None:
            raise UsageError(f"the recipe has no {spec.section}, which made the {spec} checkpoint in {self.output}; add it")
        return found

    def token_set(self, spec: StageSpec) -> TokenSet:
        """What a stage reads: a part of `data`, or in an end-to-end phase as much of the training text as it says."""
        training, settings = self.recipe.data.training, self.settings(spec)
        if isinstance(settings, EndToEnd):
            source = training.source if settings.source is None else settings.source
            return training.model_copy(update={"source": source, "sequences": settings.sequences})
        found: TokenSet = self.recipe.section(spec.text)
        return found

    def _taken(self, spec: StageSpec) -> list[_Sets]:
        """What other sets have of the texts of a stage that takes fresh sequences; see `data.tokens.Draw`."""
        phases, training = self.recipe.end_to_end, self.recipe.data.training
        if spec not in phases:
            return []
        taken: list[_Sets] = [[(training.source, training.sequences)]]
        for earlier, settings in phases.items():
            if earlier.fresh < spec.fresh:
                # The first one that it reads follows what it passes over itself.
                read = (self.token_set(earlier).source, settings.sequences)
                taken += [[*passed, read] for passed in self._taken(earlier) or [[]]]
        if (skip := phases[spec].skip) is None:
            return taken
        # A number that covers other sets passes over each as that set was read: of a stream, to the end of a batch.
        own = self.token_set(spec).source
        alike = [[size for source, size in sets if _windows_of(source) == _windows_of(own)] for sets in taken]
        return [[(own, size) for size in _divided(skip, sizes)] for sizes in filter(None, alike)] or [[(own, skip)]]

    def _before(self, spec: StageSpec) -> list[list[Source]]:
        """Sources of the sets before that of a stage that takes fresh sequences."""
        phases = self.recipe.end_to_end
        if spec not in phases:
            return []
        return [self.recipe.data.training.source, *(self.token_set(one).source for one in phases if one.fresh < spec.fresh)]

    def without_bos(self, stages: Iterable[StageSpec], evaluate: bool = False) -> str | None:
        """What to say of sets of text without BOS, where the family is lost on them; None where nothing is to be said."""
        keys = [spec.text for spec in stages if isinstance(found := self.recipe.section(spec.text), TokenSet) and not found.bos]
        keys += [spec.key for spec in self.recipe.data.evaluation if evaluate and not spec.bos]
        if not self.model.family.begins or not keys:
            return None
        # Gemma 3 270M, three segments of 1,024 tokens of novels: perplexity 33.2 with it and 62.8 without.
        names = ", ".join(dict.fromkeys(keys))
        return f"{self.model.family.text} is lost on text that does not begin with BOS: set bos: true in {names}"

    def in_torch(self) -> str | None:
        """What to say of linears whose quantized inputs no kernel of a GPU takes; None where there are none."""
        step, sizes, shapes = self.recipe.step_group, self.model.group_sizes(self.recipe.ptq), self.model.linear_shapes
        if self.recipe.act_calib.granularity != "group":
            return None
        found = [
            linear_name(block, linear)
            for block in range(self.model.blocks)
            for linear, (_, width) in shapes.items()
            if not whole_groups(step, sizes.of(block, linear), width)
        ]
        if not found:
            return None
        # One of them, and no decode step of the model is a single call.
        return (
            f"after act-calib {len(found)} of {self.model.blocks * len(shapes)} linears, {found[0]} the first, run in torch on a "
            f"GPU: their groups do not divide the {step} inputs that share a step; choose act_calib.group_size by them"
        )

    def padded(self) -> str | None:
        """What to say of linears with fewer inputs than a group; None where there are none."""
        sizes, bits = self.model.group_sizes(self.recipe.ptq), self.recipe.ptq.level_bits
        found = [
            (linear_name(block, linear), shape, size)
            for block in range(self.model.blocks)
            for linear, shape in self.model.linear_shapes.items()
            if (size := sizes.of(block, linear)) > shape[1]
        ]
        if not found:
            return None
        # "One group a row" is what people mean by it, and 97 bits a weight is what a toy got.
        name, shape, size = found[0]
        return (
            f"{len(found)} linears, {name} the first, have fewer inputs than a group: its {shape[1]} are filled up to {size} "
            f"and take {expected_bits([shape], size, bits):.2f} bits a weight; lower ptq.group_size"
        )

    def shape(self, spec: StageSpec) -> tuple[int, int]:
        """Sequences that a stage reads, and their length."""
        found = self.token_set(spec)
        return self.settings(spec).subset or found.sequences, found.length

    def stage_tokens(self, spec: StageSpec, listener: Listener | None = None) -> Tensor:
        """int64 [sequences, length] that a stage reads; of the stages before it, which are compared as well, read once.

        Of `generate:` what is not there yet is sampled. listener: who is told how far that is.
        """
        if (found := self._tokens.get(spec.name)) is None:
            found = self._tokens[spec.name] = self._read_tokens(spec, listener or Silent())
        return found

    def known_tokens(self, spec: StageSpec) -> Tensor | None:
        """`stage_tokens` that are there without the hours which sampling takes, else None.

        All else that the stage reads is read nevertheless: what is wrong with it is known before those hours.
        """
        if spec.name not in self._tokens:
            try:
                self._tokens[spec.name] = self._read_tokens(spec, None)
            except _NotSampled:
                self._tokens[spec.name] = None
        return self._tokens[spec.name]

    def _read_tokens(self, spec: StageSpec, listener: Listener | None) -> Tensor:
        """listener: None where nothing may be sampled. Raises _NotSampled then, where something would have to be."""

        def sample(item: Source, rows: int, length: int) -> Tensor:
            # Of another stage's sampled text nothing could be left out: another seed gives other text.
            wanted = Sampling(rows, length, self.recipe.runtime.seed + (spec.fresh << 20), item.temperature)

            def found() -> Tensor | None:
                if listener is None:
                    return kept_sample(self.model, self.output, wanted)
                return cached_sample(self.model, self.tokenizer, self.output, wanted, listener)

            if (text := self.group.told(found)) is None:
                raise _NotSampled
            return text

        draw = tokens.Draw(self.recipe.runtime.seed, sample, spec.text, self._taken(spec), self._before(spec))
        found = tokens.training_tokens(self.token_set(spec), self.tokenizer, self.vocab, draw)
        subset = self.settings(spec).subset
        # Spread, for the sequences may be ordered by source.
        return found if subset is None else found[torch.linspace(0, len(found) - 1, subset).round().long()]

    def evaluation(self) -> dict[str, Tensor]:
        """name -> int64 [segments, length] of data.evaluation. Raises UsageError with what is wrong with each set."""
        found, errors = {}, []
        for spec in self.recipe.data.evaluation:
            try:
                found[spec.name] = tokens.evaluation_tokens(spec, self.tokenizer, self.vocab)
            except sources.TextError as error:
                errors.append(error)
        if errors:
            raise UsageError("\n".join(sources.listed(errors)))
        return found


def prepare(
    recipe: Recipe, weights: bool = True, stages: Iterable[StageSpec] = (), evaluate: bool = False, group: Group = ALONE,
    asked: World | None = None,
) -> Plan:  # fmt: skip
    """Opens model and tokenizer and checks the sources that will be read.

    weights: False accepts a folder that holds only config.json. stages: whose text must be usable. evaluate: whether the text of
    data.evaluation must be. asked: see `Plan`. Raises UsageError with every problem found.
    """
    problems: list[str] = []

    def attempt(step: Callable[[], Any]) -> Any:
        try:
            return step()
        except UsageError as error:
            problems.append(str(error))

    node = group.node
    device = attempt(lambda: choose_device(recipe.runtime.device, place=(node.rank, node.size)))
    # NVIDIA's containers let products in float32 have ten bits of mantissa (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE): Hessians and what
    # is pushed through them would come out otherwise there than anywhere else, without a word.
    torch.set_float32_matmul_precision("highest")
    model = attempt(lambda: open_model(recipe.model, device or torch.device("cpu"), weights))
    if model is not None and recipe.ptq.group_sizes:
        attempt(lambda: model.group_sizes(recipe.ptq))
    folder = attempt(lambda: output.output_folder(recipe))
    if folder is not None:
        attempt(lambda: output.check_output(folder, model))
        attempt(lambda: output.check_overlaps(recipe, folder, None if model is None else model.folder))
    texts = dict.fromkeys(spec.text for spec in stages)
    read: dict[str, TokenSet] = {key: found for key in texts if isinstance(found := recipe.section(key), TokenSet)}
    train = any(key != TABLE[0].text for key in texts)
    measured = {spec.key for spec in recipe.data.evaluation if evaluate}
    problems += _wrong_sources(recipe, {*read, *measured, *(spec.text for spec in recipe.end_to_end if train)}, measured)
    tokenizer = None
    if model is not None and (model.entries or weights):
        tokenizer = attempt(lambda: open_tokenizer(recipe.model, model.folder))
        lengths = {f"{key}.length": found.length for key, found in read.items()}
        lengths |= {f"{spec.key}, length": spec.length for spec in recipe.data.evaluation}
        problems += _beyond_positions(lengths, model)
    if train and model is not None and model.dtype == torch.float16:
        # Gradients of float16 activations underflow; scaling the loss would only hide it.
        problems.append("training in float16 loses gradients; set model.dtype: bfloat16 (or float32), for every stage")
    if problems:
        raise UsageError("\n".join(problems))
    check_devices(group, model.device)
    return Plan(recipe, folder, model, tokenizer, group, asked)


def _wrong_sources(recipe: Recipe, read: Collection[str], measured: Collection[str]) -> list[str]:
    """What is wrong with the sources of the sets that will be read, some of them to measure on."""
    found: list[sources.TextError] = []
    for key, named in recipe.texts.items():
        for item in named if key in read else ():
            try:
                with sources.named(key):
                    sources.check(item, evaluating=key in measured)
            except sources.TextError as error:
                found.append(error)
    return sources.listed(found)


def _windows_of(sources: list[Source]) -> list[Source]:
    """Sources without what is done to their windows afterwards: those of the same text are the same."""
    return [item.model_copy(update={"repeats": 0.0}) for item in sources]


def _divided(skip: int, sets: Sequence[int]) -> tuple[int, ...]:
    """A number of sequences, as far as possible as those of sets that follow each other."""
    ends = [min(end, skip) for end in (0, *accumulate(sets))]
    return tuple(stop - start for start, stop in pairwise([*ends, skip]) if stop > start)


def _beyond_positions(lengths: dict[str, int], model: SourceModel) -> list[str]:
    limit = int(getattr(model.config, "max_position_embeddings", 0) or 0)
    return [
        f"{key} is {length}, the model has {limit} positions; lower it"
        for key, length in lengths.items()
        if limit and length > limit
    ]
