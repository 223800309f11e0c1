"""A recipe for a model on a machine: from generous settings to frugal ones, until every forecast fits.

What a setting costs is asked of the stages themselves, with the recipe as it would be written.
"""

import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from lbllm_cli.cli.draft_text import (
    BASE_MIXTURE,
    CHAT_MIXTURE,
    GROUP_SIZE,
    LEVEL_BITS,
    Settings,
    header_text,
    model_name,
    recipe_text,
)
from lbllm_cli.cli.machine import Machine, PlacedModel
from lbllm_cli.core.console import GIB
from lbllm_cli.core.errors import UsageError
from lbllm_cli.core.strict_yaml import parse_yaml
from lbllm_cli.evaluation.forecast import eval_need
from lbllm_cli.export.forecast import export_need
from lbllm_cli.format.group_sizes import GroupSizes
from lbllm_cli.format.settings import DENSE_ROWS
from lbllm_cli.format.weights import expected_bits
from lbllm_cli.pipeline.forecast import Need, checkpoint_bytes
from lbllm_cli.pipeline.output import check_overlaps
from lbllm_cli.pipeline.plan import Plan
from lbllm_cli.pipeline.work import work_of
from lbllm_cli.recipe.schema import Recipe
from lbllm_cli.recipe.stages import EXPORT, STAGES

Resource = Literal["device", "ram", "disk"]
WORDS: dict[Resource, str] = {"device": "device memory", "ram": "RAM", "disk": "disk"}
# What a forecast may take of what is free: an allocator in pieces holds more than is used, and others want some as well.
SHARES: dict[Resource, float] = {"device": 0.85, "ram": 0.9, "disk": 0.95}
# Segments of 2,048 tokens that an evaluation text has, for those that are measured whole: with LLaMA-2's tokenizer, which makes
# the most of them.
_WHOLE = {"wikitext2": 170, "c4": 256}
# A model of fewer parameters is trained on a CPU in hours.
SMALL = 1e9
# Settings that are lowered where something is short, those first that change no result, then those that cost the least.
_RELIEF: dict[Resource, tuple[str, ...]] = {
    "device": ("streams", "own_text", "batch", "micro", "phases", "asymmetric", "length"),
    "ram": ("streams", "own_text", "batch", "micro", "phases", "asymmetric", "training", "calibration", "length"),
    "disk": ("training", "phases", "calibration", "length"),
}
_LOWEST = {"batch": 1, "micro": 1, "training": 32, "calibration": 16, "length": 128, "phases": 64}


@dataclass(frozen=True)
class Shortage:
    """Of a stage: bytes that it needs of a resource, and how many it may have."""

    stage: str
    resource: Resource
    needed: float
    room: float

    def __str__(self) -> str:
        return (
            f"{self.stage} needs about {self.needed / GIB:.1f} GiB of {WORDS[self.resource]}, "
            f"{self.room / GIB:.1f} GiB may be used of what is free"
        )


@dataclass(frozen=True)
class Draft:
    """A recipe that fits. text: as it is written. needs: forecasts of everything that it runs."""

    text: str
    recipe: Recipe
    needs: list[Need]


@dataclass
class _Search:
    """What is known while settings are lowered. reasons: setting -> why it is lower than the most generous one."""

    model: PlacedModel
    _export: Need | None = None
    reasons: dict[str, str] = field(default_factory=dict)

    def recipe(self, settings: Settings) -> Recipe:
        """What these settings are when they are written and read again."""
        return Recipe.model_validate(parse_yaml(recipe_text(settings, {}), "the draft"))

    def needs(self, settings: Settings) -> list[Need]:
        """Forecasts as `lbllm validate` makes them."""
        recipe, model = self.recipe(settings), self.model
        plan = Plan(recipe, Path(recipe.output.dir), model, None)
        stages = sorted(recipe.stages, key=lambda spec: spec.end_to_end)
        segments = {name: -(-count * 2048 // settings.measured) for name, count in _WHOLE.items()}
        if self._export is None:
            # Nothing that is chosen changes it.
            self._export = export_need(recipe, model)
        return [
            *(work_of(spec).need(plan, spec, None) for spec in stages),
            eval_need(recipe, model, segments, 1 + len(recipe.stages)),
            self._export,
        ]

    def takes(self, settings: Settings) -> dict[tuple[str, Resource], float]:
        """Bytes by stage and resource. A stage's disk holds the checkpoints before it, and weights that are yet to be fetched."""
        taken: dict[tuple[str, Resource], float] = {}
        model = self.model
        weights = 2.0 * model.count(list(model.shapes))
        before = 0.0 if model.entries else weights
        for need in self.needs(settings):
            if model.machine.has_gpu:
                taken[need.stage, "device"] = need.device
            taken[need.stage, "ram"] = need.ram
            taken[need.stage, "disk"] = before + need.disk + need.teacher
            before += checkpoint_bytes(model, GroupSizes(GROUP_SIZE), LEVEL_BITS) if need.stage in STAGES else 0
        return taken

    def shortages(self, settings: Settings) -> list[Shortage]:
        """What does not fit."""
        machine = self.model.machine
        room = {"device": machine.memory, "ram": machine.ram, "disk": machine.disk}
        found = [
            Shortage(stage, resource, needed, SHARES[resource] * room[resource])
            for (stage, resource), needed in self.takes(settings).items()
        ]
        return [shortage for shortage in found if shortage.needed > shortage.room]

    def relieved(self, settings: Settings, short: Shortage) -> Settings | None:
        """The first settings that need less of what is short; None where none do."""
        for key in _RELIEF[short.resource]:
            for value in lower(settings, key):
                changed = replace(settings, **{key: value})
                if self.takes(changed).get((short.stage, short.resource), 0.0) < short.needed:
                    self.reasons[key] = _reason(key, getattr(settings, key), short)
                    return changed
        return None


def _reason(key: str, value: Any, short: Shortage) -> str:
    """Why a setting has not this value any more."""
    given = {
        "own_text": "where the model samples text",
        "streams": f"with streams {'on the GPU' if value == 'device' else 'in RAM'}",
        "phases": f"of {value} sequences",
    }.get(key, f"with {value}")
    sizes = f"{short.needed / GIB:.1f} GiB of {WORDS[short.resource]}, {short.room / GIB:.1f} may be used"
    return f"{given} {short.stage} needs {sizes}"


def lower(settings: Settings, key: str) -> Iterator[Any]:
    """Values below a setting's, the nearest first."""
    value: Any = getattr(settings, key)
    if key == "streams":
        places = ("device", "ram", "disk")
        yield from places[places.index(value) + 1 :]
    elif key == "own_text":
        yield from [False] if value else []
    elif key == "asymmetric":
        yield from ["0"] if value == "auto" else []
    else:
        while value > _LOWEST[key]:
            value //= 2
            yield value
        if key == "phases" and value:
            yield 0


def generous(model: PlacedModel, path: str, output: str, chat: bool) -> Settings:
    """What to begin with, by the kind of machine and the model's size: hours on a GPU, and on a CPU as well."""
    small = model.count(list(model.shapes)) < SMALL
    limit = int(getattr(model.config, "max_position_embeddings", 0) or 0) or 2048
    common = Settings(
        path=path, output=output, dtype=str(model.dtype).removeprefix("torch."),
        length=min(2048, limit), measured=min(2048, limit),
        mixture=CHAT_MIXTURE if chat else BASE_MIXTURE, bos=model.family.begins,
        family=(model.family.drafted, model.family.measured),
        head_bits=16 if model.config.model_type in DENSE_ROWS else 8,
    )  # fmt: skip
    if model.machine.has_gpu:
        return common
    return replace(
        common, streams="ram", length=min(512, limit), calibration=32, training=256 if small else 64, phases=128 if small else 0,
        micro=1, segments=40 if small else 20, own_text=small, processor=True,
    )  # fmt: skip


def _placed(search: _Search, settings: Settings, name: str) -> Settings:
    """Settings with the run beside the model's folder, where it would lie in that or around it."""
    try:
        check_overlaps(search.recipe(settings), Path(settings.output), search.model.folder)
    except UsageError:
        folder = search.model.folder.resolve()
        return replace(settings, output=os.path.relpath(folder.parent / f"{folder.name}-runs" / name))
    return settings


def _bits(model: PlacedModel, size: int) -> str:
    """Bits per weight in groups of a size."""
    return f"{expected_bits(model.binarized_shapes, size, LEVEL_BITS):.4g}"


def draft(model: PlacedModel, path: str, target: str, chat: bool) -> Draft:
    """A recipe for a model on its machine.

    path: of the model, as the recipe has it. target: the recipe's file, for the commands in it. chat: whether there is a chat
    template. Raises UsageError naming every stage that fits the machine with no settings.
    """
    search = _Search(model)
    name = Path(target).stem
    settings = _placed(search, generous(model, path, f"runs/{name}", chat), name)
    while shortages := search.shortages(settings):
        lowered = next((found for short in shortages if (found := search.relieved(settings, short)) is not None), None)
        if lowered is None:
            raise UsageError(_refusal(path, model.machine, shortages))
        settings = lowered
    needs = search.needs(settings)
    phases = ", with an end-to-end phase after each stage that trains" if settings.phases else ""
    titles = [
        f"{model_name(path)}, groups of {GROUP_SIZE}: W(1+1)A4KV4{phases}.",
        f"Written by `lbllm init {shlex.quote(path)}` for a machine with",
        f"{model.machine}.",
    ]
    header = header_text(titles, target, settings.output, _needs_in_words(model, settings, needs))
    smaller = 2 * GROUP_SIZE
    search.reasons["group_size"] = f"{_bits(model, GROUP_SIZE)} bits per weight; {smaller}: {_bits(model, smaller)}"
    text = header + recipe_text(settings, search.reasons)
    return Draft(text, Recipe.model_validate(parse_yaml(text, target)), needs)


def _needs_in_words(model: PlacedModel, settings: Settings, needs: list[Need]) -> list[str]:
    disk = max(need.disk + need.teacher for need in needs)
    kept = checkpoint_bytes(model, GroupSizes(GROUP_SIZE), LEVEL_BITS)
    export = next(need.disk for need in needs if need.stage == EXPORT)
    words = [f"{need.stage} {need.device / GIB:.1f}" for need in needs if need.device]
    device = [f"GPU memory in GiB: {', '.join(words)};"] if model.machine.has_gpu else []
    return [
        f"forecast in {settings.dtype}; `lbllm validate` makes it anew, and says how long everything takes.",
        *device,
        f"{max(need.ram for need in needs) / GIB:.1f} GiB of RAM at most; {disk / GIB:.1f} GiB of disk while a stage runs,",
        f"{kept / GIB:.1f} for each checkpoint and {export / GIB:.1f} for the export, beside the model itself.",
    ]


def _refusal(path: str, machine: Machine, shortages: list[Shortage]) -> str:
    lines = "\n".join(f"  {shortage}" for shortage in shortages)
    return (
        f"{path} does not fit this machine ({machine}) with the most frugal settings:\n{lines}\n"
        "take a smaller model, or a machine with more"
    )
