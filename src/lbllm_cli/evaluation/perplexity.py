"""Perplexity of the base model and of checkpoints, and how far these are from it, for models larger than memory."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Sequential

from lbllm_cli.evaluation.routing import agreements, choices_of
from lbllm_cli.models.model import FINAL_NORM, SourceModel
from lbllm_cli.models.stored import stored_block
from lbllm_cli.parallel.group import ALONE, Group
from lbllm_cli.pipeline.checkpoint import Checkpoint
from lbllm_cli.pipeline.forecast import Place
from lbllm_cli.pipeline.metrics import BlockError
from lbllm_cli.pipeline.reporter import Reporter
from lbllm_cli.pipeline.streams import HiddenStream, advance, batches, embed_stream, fetched
from lbllm_cli.recipe.stages import BASE
from lbllm_cli.training.agreement import POSITIONS, Agreement, Predictions


@dataclass(frozen=True)
class Measured:
    """One checkpoint on one text. blocks: its errors beside the teacher's block outputs, in order; none for the base model.

    routing: of a mixture of experts, by block the share of the teacher's choices that it makes as well.
    """

    agreement: Agreement
    blocks: list[BlockError]
    routing: list[float]

    def as_dict(self) -> dict[str, Any]:
        """For the cache and the report: what one model alone has, and what it has beside the teacher."""
        alone = {"perplexity": self.agreement.perplexity, "positions": self.agreement.by_position()}
        if not self.blocks:
            return alone
        beside = {"kl": self.agreement.mean_divergence, "top1": self.agreement.top1}
        errors = [
            {"relative": e.relative, "relative_ordinary": e.relative_ordinary, "cosine": e.cosine, "decibels": e.decibels}
            for e in self.blocks
        ]
        if self.routing:
            beside["routing"] = sum(self.routing) / len(self.routing)
            errors = [{**error, "routing": share} for error, share in zip(errors, self.routing, strict=True)]
        return {**alone, **beside, "blocks": errors}


def _in_words(found: Measured | None) -> str:
    return "not finite" if found is None else f"{found.agreement.perplexity:.2f}"


class Evaluation:
    """The base model and checkpoints on the same texts, all of them block by block beside each other.

    So the teacher runs once for all, and neither a model nor the logits of a text are ever whole in memory. checkpoints: by
    name; BASE is the teacher. folder: where streams lie on disk, None for memory. place: whose. group: of ranks, of which each
    runs its share of the segments.
    """

    def __init__(
        self, model: SourceModel, checkpoints: dict[str, Checkpoint], batch_size: int, folder: Path | None, place: Place = "ram",
        group: Group = ALONE,
    ):  # fmt: skip
        self.group = group
        self.model = model
        self.checkpoints = checkpoints
        self.batch_size = batch_size
        self.folder = folder
        self.place = model.device if place == "device" else None
        self._streams: dict[tuple[str, str], HiddenStream] = {}
        # By text, what the teacher's tokens chose in the present block.
        self._choices: dict[str, list[Tensor]] = {}
        self._routing: dict[tuple[str, str], list[float]] = {}

    def run(
        self, sets: dict[str, Tensor], wanted: dict[str, list[str]], reporter: Reporter
    ) -> dict[tuple[str, str], Measured | None]:
        """Measured by checkpoint and text; None where a prediction, or the base model's beside it, is not finite.

        sets: text -> tokens int64 [segments, length]; the first token of a segment is not predicted. wanted: text -> names of
        checkpoints to measure on it; the base model is always measured.
        """
        sets = {text: tokens[self.group.share(len(tokens)).slice] for text, tokens in sets.items()}
        names = {text: [BASE, *(name for name in wanted[text] if name != BASE)] for text in sets}
        blocks: dict[tuple[str, str], list[BlockError]] = {(name, text): [] for text in sets for name in names[text]}
        try:
            for name, text in blocks:
                tail = "" if self.group.size == 1 else f".rank{self.group.rank:03d}"
                path = self.folder / f"{text}.{name}{tail}.bin" if self.folder else None
                self._streams[name, text] = embed_stream(self.model, sets[text], path, self.batch_size, self.place)
            for index in range(self.model.blocks):
                reporter.begin_block(index)
                # The base model first: the others are compared with its outputs.
                for name in (BASE, *self.checkpoints):
                    texts = [text for text in sets if name in names[text]]
                    self._advance(index, name, texts, blocks)
                reporter.step(index)
            heads = self._heads()
            measured: dict[tuple[str, str], Measured | None] = {}
            for text, tokens in sets.items():
                found = dict(self._predict(heads, text, tokens, names[text], blocks))
                reporter.note(f"{text}: {', '.join(f'{name} {_in_words(one)}' for (name, _), one in found.items())}")
                measured |= found
            return measured
        finally:
            for stream in self._streams.values():
                stream.remove()
            self._streams.clear()

    def _advance(self, index: int, name: str, texts: list[str], blocks: dict[tuple[str, str], list[BlockError]]) -> None:
        if not texts:
            return
        model = self.model
        if name == BASE:
            block = model.block(index)
        else:
            checkpoint = self.checkpoints[name]
            block = stored_block(model, index, checkpoint.read_block(index), checkpoint.activations)
        for text in texts:
            stream = self._streams[name, text]
            targets = None if name == BASE else self._streams[BASE, text]
            with choices_of(block) as choices:
                error = advance(block, stream, stream, model.device, self.batch_size, targets)
            if name == BASE:
                self._choices[text] = choices
                continue
            error.pool(self.group)
            blocks[name, text].append(error)
            same, made = self.group.total(agreements(self._choices[text], choices))
            if made:
                self._routing.setdefault((name, text), []).append(same / made)

    def _heads(self) -> dict[str, Module]:
        """Final norm and head of each: only norms differ, the matrix is one."""
        base: Any = self.model.head()
        heads: dict[str, Module] = {BASE: base}
        for name, checkpoint in self.checkpoints.items():
            own: Any = base
            if outer := checkpoint.read_outer():
                own = Sequential(copy.deepcopy(base[0]), base[1])
                own[0].weight.copy_(outer[FINAL_NORM])
            heads[name] = own
        return heads

    def _predict(
        self,
        heads: dict[str, Module],
        text: str,
        tokens: Tensor,
        names: list[str],
        blocks: dict[tuple[str, str], list[BlockError]],
    ) -> Iterator[tuple[tuple[str, str], Measured | None]]:
        found = {name: Agreement(tokens.shape[1]) for name in names}
        pieces = list(batches(0, tokens.shape[0], 1))
        streams = tuple(self._streams[name, text] for name in names)
        for rows, states in zip(pieces, fetched(streams, pieces, self.model.device), strict=True):
            wanted = tokens[rows][0, 1:].to(self.model.device)
            hidden = {name: state[0, :-1] for name, state in zip(names, states, strict=True)}
            for start in range(0, len(wanted), POSITIONS):
                piece = slice(start, start + POSITIONS)
                teacher = Predictions(heads[BASE](hidden[BASE][piece]))
                for name in names:
                    student = teacher if name == BASE else Predictions(heads[name](hidden[name][piece]))
                    found[name].add(start, teacher, student, wanted[piece])
        for name in names:
            found[name].pool(self.group)
            routing = self._routing.get((name, text), [])
            yield (name, text), Measured(found[name], blocks[name, text], routing) if found[name].finite else None


def whole_perplexity(model: Module, tokens: Tensor, device: torch.device) -> float | None:
    """Perplexity of a model that is whole in memory, as transformers runs it; None where a prediction is not finite.

    tokens: int64 [segments, length].
    """
    found = Agreement(tokens.shape[1])
    for rows in batches(0, tokens.shape[0], 1):
        row = tokens[rows].to(device)
        logits = model(input_ids=row, use_cache=False).logits[0, :-1]
        for start in range(0, len(logits), POSITIONS):
            student = Predictions(logits[start : start + POSITIONS])
            found.add(start, student, student, row[0, 1:][start : start + POSITIONS])
    return found.perplexity if found.finite else None
