"""What stages and loaded models do with models of true shapes, on a simulated GPU whose large tensors have no values."""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from random_models import FORMAT, GROUP, KNEES, dense_model, packed_model
from simulated_gpu.device import CUDA, Device
from simulated_gpu.regions import phased, replace
from simulated_gpu.sampling import sample
from torch import Tensor
from transformers import AutoConfig

from lbllm_cli.core.headers import TensorEntry
from lbllm_cli.format.activations import ActivationFormat, stored_clip
from lbllm_cli.format.names import KEYS, VALUES, input_name
from lbllm_cli.format.weights import PackedWeight, group_count
from lbllm_cli.models.block import block_prefix
from lbllm_cli.models.model import SourceModel
from lbllm_cli.pipeline.plan import Plan
from lbllm_cli.pipeline.reporter import Reporter
from lbllm_cli.pipeline.work import StageRun, work_of
from lbllm_cli.recipe.load import load_recipe
from lbllm_cli.recipe.schema import Ptq
from lbllm_cli.recipe.stages import STAGES
from lbllm_cli.runtime.backend import in_ram
from lbllm_cli.training.knees import tables_of

# Tokens of a sequence, sequences of the streams, and of an end-to-end phase: one step, and one held out. Tokens of a prompt.
LENGTH, ROWS, WHOLE_ROWS, PROMPT = 2048, 8, 3, 512
# Functions of the package whose work is counted under a name of its own. One that is gone is left out.
PHASES = {
    "ptq": (
        ("lbllm_cli.ptq.collect", "Collector.collect", "moments"),
        ("lbllm_cli.ptq.fit", "inverse_factor", "factor"),
        ("lbllm_cli.ptq.fit", "compensate", "compensate"),
        ("lbllm_cli.ptq.fit", "descend_codes", "descend"),
        ("lbllm_cli.ptq.fit", "refit_levels", "refit"),
    ),
    "training": (
        ("lbllm_cli.training.loop", "TrainingLoop.step", "step"),
        ("lbllm_cli.training.block", "BlockObjective.held_out", "held out"),
        ("lbllm_cli.end_to_end.trainer", "EndToEndObjective.held_out", "held out"),
        ("lbllm_cli.end_to_end.stage", "teacher_states", "teacher"),
        ("lbllm_cli.act_calib.fit", "fit_knees", "search"),
    ),
}
# What is done -> the stage that does it, and what its recipe says otherwise.
STAGE_THINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "ptq": ("ptq", {}),
    "distill": ("distill", {}),
    "act-calib": ("act-calib", {}),
    "distill-end-to-end": ("distill-e2e", {}),
    "act-calib-end-to-end": ("act-calib-e2e", {}),
    "table-search": ("act-calib", {"act_calib": {"epochs": 0}}),
}
# What is done -> the model that does it.
MODEL_THINGS: dict[str, Callable[..., Any]] = {
    "decode": packed_model,
    "decode-bf16": dense_model,
    "decode-weights-only": partial(packed_model, quantized=False),
    "prefill": packed_model,
}
THINGS = (*STAGE_THINGS, *MODEL_THINGS)


class _Committed(Exception):
    """What is to be counted is done."""


def count(device: Device, thing: str, config: Any, folder: Path, changes: list[str]) -> dict[str, Any]:
    """Does a thing with a model of a configuration. folder: to write to. changes: of the recipe, KEY=VALUE.

    Gives `peak` and `forecast`, bytes, the latter of stages; `broken`, rules and lines; and for each of `phases` its
    `accounting.Row`, how often it was entered (`times`), and the most bytes that were alive in it (`peak`).
    """
    times: Counter[str] = Counter()
    forecast = None
    with torch.no_grad(), device.accounts.within("passes" if thing in STAGE_THINGS else "load"):
        if thing in STAGE_THINGS:
            forecast = _stage(device, thing, config, folder, changes, times)
        else:
            _tokens(device, thing, config, times)
    phases = {
        name: {**vars(row), "times": times.get(name, 1), "peak": device.memory.peaks.get(name, 0)}
        for name, row in device.accounts.phases().items()
    }
    return {"peak": device.memory.peak, "forecast": forecast, "phases": phases, "broken": sorted(device.rules.broken)}


def _counting(times: Counter[str], phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def inside(*args: Any, **kwargs: Any) -> Any:
        times[phase] += 1
        return function(*args, **kwargs)

    return inside


# A stage.


def _stage(device: Device, thing: str, config: Any, folder: Path, changes: list[str], times: Counter[str]) -> float:
    name, sections = STAGE_THINGS[thing]
    spec = STAGES[name]
    if not spec.end_to_end:
        # The second block is there to be made ready while the first is left.
        config.num_hidden_layers = 2
    model = _source_model(device, config, folder)
    plan = Plan(load_recipe(_recipe(folder, sections), changes), folder / "run", model, None)
    _prepare(device, spec.end_to_end, times)
    if thing in ("act-calib", "act-calib-end-to-end"):
        replace("lbllm_cli.act_calib.fit", "fit_knees", lambda _: lambda samples: [KNEES[: its.tables] for its in samples])
    quantized = dataclasses.replace(FORMAT, group_size=plan.recipe.step_group) if name == "act-calib-e2e" else None
    parent = _Parent(model, quantized, plan.recipe.ptq) if spec.parents else None
    work = work_of(spec)
    need = work.need(plan, spec, None)
    tokens = torch.zeros(WHOLE_ROWS if spec.end_to_end else ROWS, LENGTH, dtype=torch.int64)
    given: Any = parent
    writer: Any = _Writer(folder)
    run = StageRun(spec, plan, need, tokens, given, work.activations(plan, given), writer, Reporter(name, model))
    with suppress(_Committed):
        work.run(run)
    return need.device


def _prepare(device: Device, end_to_end: bool, times: Counter[str]) -> None:
    sample(device.accounts, "lbllm_cli.ptq.compensate", "lbllm_cli.ptq.refine")
    for module, path, phase in (*PHASES["ptq"], *PHASES["training"]):
        with suppress(AttributeError):
            replace(module, path, partial(_counting, times, phase))
            phased(device, module, path, phase)
    if end_to_end:
        replace("lbllm_cli.training.loop", "TrainingLoop.run", _then_stop)


def _then_stop(run: Callable[..., Any]) -> Callable[..., Any]:
    def inside(*args: Any) -> None:
        run(*args)
        raise _Committed

    return inside


def _recipe(folder: Path, sections: dict[str, Any]) -> Path:
    """The defaults, at a large model's length. Streams are in RAM, so that the device's memory is the work's."""
    text = {"length": LENGTH, "source": "builtin:calibration"}
    micro = {"micro_batch_size": 1, "batch_size": 2, "epochs": 1}
    recipe: dict[str, Any] = {
        "model": {"path": str(folder), "dtype": "bfloat16"},
        "output": {"dir": str(folder / "run")},
        "runtime": {"device": "cuda", "streams": "ram"},
        "data": {"calibration": {**text, "sequences": 128}, "training": {**text, "sequences": 1024}},
        "ptq": {"group_size": GROUP},
        "distill": {**micro, "end_to_end": {}},
        "act_calib": {**micro, "end_to_end": {}},
    }
    for section, values in sections.items():
        recipe[section] |= values
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    return path


def _source_model(device: Device, config: Any, folder: Path) -> SourceModel:
    """A model whose tensors are all there in bfloat16, without values."""
    config.save_pretrained(folder)
    own = AutoConfig.from_pretrained(folder)
    entries: dict[str, TensorEntry] = {}
    model = SourceModel(folder, own, entries, CUDA, torch.bfloat16)
    entries |= {name: TensorEntry(folder / "config.json", "BF16", shape) for name, shape in model.shapes.items()}

    def read_tensors(entries: dict[str, TensorEntry], names: list[str], _: torch.device) -> dict[str, Tensor]:
        made = {name: torch.empty(entries[name].shape, dtype=torch.bfloat16, device=CUDA) for name in names}
        # Of what is small there are values: norms of zeros would be divided by.
        found = {name: tensor if tensor.dim() > 1 else tensor.fill_(1) for name, tensor in made.items()}
        device.accounts.copied(uploads=sum(entries[name].nbytes for name in names))
        return found

    replace("lbllm_cli.models.folder", "read_tensors", lambda _: read_tensors)
    return model


class _Writer:
    """Keeps a block in RAM as a file of the stage would hold it, and ends at the first that is committed."""

    blocks_done = 0

    def __init__(self, path: Path):
        self.path = path

    def write_block(self, index: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return in_ram(tensors)

    def commit(self, index: int) -> None:
        raise _Committed


class _Parent:
    """A checkpoint whose codes are all 0. activations: how it quantizes them. form: of its weights."""

    def __init__(self, model: SourceModel, activations: ActivationFormat | None, form: Ptq):
        self.model, self.activations, self.form = model, activations, form

    def read_block(self, index: int) -> dict[str, Tensor]:
        prefix, found, size, bits = block_prefix(index), {}, self.form.group_size, self.form.level_bits
        for name in self.model.linears:
            out, width = self.model.shapes[f"{prefix}{name}.weight"]
            groups = group_count(width, size)
            codes = torch.zeros(out, groups, size // 4, dtype=torch.uint8)
            levels = torch.tensor([-4, 4, -41, 41], dtype=torch.int8).repeat(out, groups, 1)
            packed = PackedWeight(codes, levels, torch.ones(out, groups, dtype=torch.float16), width, bits)
            found |= packed.to_tensors(prefix + name)
        return found if self.activations is None else found | self._quantizers(prefix)

    def _quantizers(self, prefix: str) -> dict[str, Tensor]:
        tables, found = tables_of(KNEES), {}
        assert tables.zero is not None
        for name in (*map(input_name, self.model.units), KEYS, VALUES):
            parts = {"act_levels": tables.levels, "act_zero": tables.zero, "act_clip": stored_clip(tables.clip)}
            found |= {f"{prefix}{name}.{part}": tensor for part, tensor in parts.items()}
        return found

    def read_outer(self) -> dict[str, Tensor]:
        return {}


# A loaded model.


def _tokens(device: Device, thing: str, config: Any, times: Counter[str]) -> None:
    """A prompt, then tokens one by one: the first after it sets up what later ones find."""
    model = MODEL_THINGS[thing](config, CUDA)
    length = LENGTH if thing == "prefill" else PROMPT
    cache = None
    for phase, tokens in (("prompt", length), *([] if thing == "prefill" else [("first token", 1), ("token", 1)])):
        times[phase] += 1
        with device.accounts.within(phase):
            ids = torch.zeros(1, tokens, dtype=torch.int64, device=CUDA)
            cache = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
