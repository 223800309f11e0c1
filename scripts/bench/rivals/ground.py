"""What every rival starts from and hands back: a recipe's texts and base model, and a model folder with other linears."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lbllm_cli.core import files, model_folder
from lbllm_cli.models.model import SourceModel, open_model
from lbllm_cli.pipeline.plan import Plan, prepare
from lbllm_cli.recipe.schema import Recipe
from lbllm_cli.recipe.stages import STAGES


@dataclass(frozen=True)
class Ground:
    """The same for all rivals. calibration, training: tokens int64 [sequences, length]. out: the folder of the benchmark."""

    plan: Plan
    calibration: Tensor
    training: Tensor
    out: Path

    @property
    def model(self) -> SourceModel:
        """The full-precision model, in float32."""
        return self.plan.model


@dataclass(frozen=True)
class Made:
    """Dequantized weights by full name, float32 [out, in]; what became known while they were made, for the row."""

    weights: dict[str, Tensor]
    note: str = ""


@dataclass(frozen=True)
class Rival:
    """One row. bits: of a block linear's weight, all that is stored counted. formula: how they add up. asked: only by name."""

    bits: float
    formula: str
    make: Callable[[Ground], Made]
    asked: bool = False


def open_ground(recipe: Recipe, out: Path) -> Ground:
    """Checks the recipe and reads its texts."""
    stages = (STAGES["ptq"], STAGES["distill"])
    plan = prepare(recipe, stages=stages, evaluate=True)
    calibration, training = map(plan.stage_tokens, stages)
    return Ground(plan, calibration, training, out)


def write_folder(model: SourceModel, weights: dict[str, Tensor], folder: Path) -> None:
    """A copy of the base model with its block linears replaced by `weights`; the folder appears whole or not at all."""
    if missing := set(model.binarized_names) ^ set(weights):
        raise ValueError(f"expected the block linears, missing or left over: {sorted(missing)[:3]}")
    for name, weight in weights.items():
        if tuple(weight.shape) != model.shapes[name]:
            raise ValueError(f"{name}: expected {model.shapes[name]}, got {tuple(weight.shape)}")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    kept = model.read([name for name in model.shapes if name not in weights])
    tensors = {**kept, **{name: weight.float().contiguous() for name, weight in weights.items()}}
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    files.write_json(partial / "config.json", model.exported_config())
    model_folder.copy_metadata(model.folder, partial)
    partial.rename(folder)


def open_folder(ground: Ground, folder: Path) -> SourceModel:
    """A folder of `write_folder`, computed in as the base model is."""
    return open_model(ground.plan.recipe.model.model_copy(update={"path": str(folder)}), torch.device("cpu"))
