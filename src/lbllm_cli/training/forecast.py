"""What the stages that train will need: masters, gradients, moments and activations, of a block or of the whole model."""

from dataclasses import replace
from typing import Any

import psutil
import torch

from lbllm_cli.end_to_end.loss import LOGITS
from lbllm_cli.models.model import SourceModel
from lbllm_cli.pipeline.forecast import (
    PROCESS,
    Need,
    activation_bytes,
    block_bytes,
    checkpoint_bytes,
    outer_bytes,
    sampling_bytes,
    stage_need,
)
from lbllm_cli.pipeline.reporter import GIB
from lbllm_cli.recipe.schema import Recipe
from lbllm_cli.recipe.training import ActCalib, ActEndToEnd, Distill, EndToEnd
from lbllm_cli.training.quantizers import KNEES

# float32 tensors of an input's size that a quantizer keeps for its backward pass: measured 2.0, and 17.3 while knees are soft.
KEPT_DEPLOYED, KEPT_SOFT = 2.0, 20.0


def _masters(model: SourceModel, settings: Distill | ActCalib, group_size: int) -> tuple[float, float]:
    """Masters of a block's linears, how many are trained and how many are not; quantizers are too small to count."""
    weights = model.count(model.binarized_names) / model.blocks
    sizes = {"levels": weights * 4 / group_size}
    if isinstance(settings, Distill) or "weights" in settings.trained:
        sizes["weights"] = weights
    if isinstance(settings, Distill) and settings.parametrisation == "bitmap":
        sizes["bitmap"] = weights
    trained = sum(size for kind, size in sizes.items() if kind in settings.trained)
    return trained, sum(sizes.values()) - trained


def _training_activations(model: SourceModel, rows: int, length: int) -> float:
    """What one forward pass of a block keeps for its backward pass."""
    config = model.config
    return rows * length * (14 * config.hidden_size + 5 * config.intermediate_size) * max(model.dtype.itemsize, 4)


def distill_need(recipe: Recipe, model: SourceModel) -> Need:
    """Need of `lbllm distill`."""
    tokens, settings = recipe.data.training, recipe.distill
    device, state = _training_device(recipe, model, settings), 12 * _masters(model, settings, recipe.ptq.group_size)[0]
    need = stage_need("distill", recipe, model, tokens, device, state=state)
    return replace(need, cheaper=_cheaper(recipe, model))


def act_calib_need(recipe: Recipe, model: SourceModel) -> Need:
    """Need of `lbllm act-calib`."""
    settings = recipe.act_calib
    device, state = _training_device(recipe, model, settings), 12 * _masters(model, settings, recipe.ptq.group_size)[0]
    tokens = recipe.data.training.model_copy(update={"sequences": settings.sequences or recipe.data.training.sequences})
    need = stage_need("act-calib", recipe, model, tokens, device, state=state)
    return replace(need, cheaper="lower act_calib.micro_batch_size or runtime.batch_size")


def _quantizer_activations(model: SourceModel, settings: ActCalib | ActEndToEnd, rows: int, length: int) -> float:
    """What quantizing the inputs of a block keeps for its backward pass."""
    config = model.config
    inputs = 3 * config.hidden_size + config.intermediate_size
    soft = KNEES in settings.trained and settings.soft > 0
    return (KEPT_SOFT if soft else KEPT_DEPLOYED) * 4 * rows * length * inputs


def _training_device(recipe: Recipe, model: SourceModel, settings: Distill | ActCalib) -> float:
    """The teacher's block; masters, their gradients and AdamW's two moments; the weights they stand for, in float32 and in the
    compute dtype with a gradient; activations. Or the teacher's pass over the data, if that is more."""
    trained, frozen = _masters(model, settings, recipe.ptq.group_size)
    weights = model.count(model.binarized_names) / model.blocks
    length = recipe.data.training.length
    current = weights * (4.0 + 1.0 + 2.0 * model.dtype.itemsize)
    rows = min(settings.micro_batch_size, settings.batch_size)
    passing = _training_activations(model, rows, length)
    passing += _quantizer_activations(model, settings, rows, length) if isinstance(settings, ActCalib) else 0
    teaching = 2 * block_bytes(model) + activation_bytes(model, recipe.runtime.batch_size, length)
    return max(block_bytes(model) + 16 * trained + 4 * frozen + current + passing, teaching)


def _passing_bytes(recipe: Recipe, model: SourceModel, settings: EndToEnd) -> float:
    """What a block of an end-to-end phase keeps for its backward pass, decoded weights included."""
    length, rows = recipe.data.training.length, min(settings.micro_batch_size, settings.batch_size)
    weights = model.count(model.binarized_names) / model.blocks
    kept = weights * (1 + model.dtype.itemsize) + _training_activations(model, rows, length)
    return kept + (_quantizer_activations(model, settings, rows, length) if isinstance(settings, ActEndToEnd) else 0)


def recomputes(recipe: Recipe, model: SourceModel, settings: EndToEnd) -> bool:
    """Whether an end-to-end phase computes blocks again on the way back: as the recipe says, or by the memory that is free."""
    if settings.recompute != "auto":
        return settings.recompute == "always"
    cuda = model.device.type == "cuda"
    free = torch.cuda.mem_get_info(model.device)[0] if cuda else psutil.virtual_memory().available
    return model.blocks * _passing_bytes(recipe, model, settings) > free / 2


def end_to_end_need(recipe: Recipe, model: SourceModel, settings: EndToEnd, stage: str) -> Need:
    """Need of an end-to-end phase: the rule of one block on the device does not hold there.

    Resident are packed codes, masters of levels with gradient and two moments, embedding and head. With recomputation one block
    at a time keeps what its backward pass needs, and of all others the inputs are kept. The loss takes four tensors of logits.
    The teacher went ahead block by block.
    """
    length, rows = recipe.data.training.length, min(settings.micro_batch_size, settings.batch_size)
    weights, itemsize = model.count(model.binarized_names), model.dtype.itemsize
    levels = weights * 4 / recipe.ptq.group_size
    trained = levels / 4 if "scales" in settings.trained else levels if "levels" in settings.trained else 0
    recomputed = recomputes(recipe, model, settings)
    passing = (1 if recomputed else model.blocks) * _passing_bytes(recipe, model, settings)
    passing += model.blocks * rows * length * model.config.hidden_size * itemsize + 8 * weights / model.blocks
    resident = weights / 4 + 4 * levels + 12 * trained + model.count(model.outer_names()) * itemsize
    loss = 4.0 * 4 * max(LOGITS, model.config.vocab_size)
    teaching = outer_bytes(model) + 2 * block_bytes(model) + activation_bytes(model, recipe.runtime.batch_size, length)
    device = max(resident + passing + loss, teaching)
    states = float(settings.sequences * length * model.config.hidden_size * itemsize)
    state, blocks = 12.0 * trained, checkpoint_bytes(model, recipe.ptq.group_size)
    ram = PROCESS + (device if model.device.type == "cpu" else block_bytes(model))
    if any(item.source == "generate:" for item in settings.source or recipe.data.training.source):
        ram = max(ram, PROCESS + sampling_bytes(model, settings.sequences, length))
    written = (model.blocks + 1) * states + blocks
    cheaper = "set end_to_end.recompute: always and micro_batch_size: 1, or train: [scales, norms]"
    # The teacher's pass holds a block's inputs beside its outputs; training has its outputs alone.
    own, elsewhere = blocks + 2 * state, 2 * states if settings.teacher else 0.0
    disk = own if settings.teacher else max(2 * states, own + states)
    return Need(stage, device, ram, disk, states, True, written, state, recipe.runtime.save_minutes, cheaper, elsewhere)


def _cheaper(recipe: Recipe, model: SourceModel) -> str:
    """Settings of distill that need less device memory, with what each alone would need."""
    settings = recipe.distill
    alternatives: dict[str, dict[str, Any]] = {}
    if settings.parametrisation == "bitmap":
        alternatives["distill.parametrisation: nearest"] = {"parametrisation": "nearest", "train": None}
    if min(settings.micro_batch_size, settings.batch_size) > 1:
        alternatives["distill.micro_batch_size: 1"] = {"micro_batch_size": 1}
    if settings.trained != ("levels",):
        alternatives["distill.train: [levels]"] = {"train": ["levels"]}
    needs = {key: _training_device(recipe, model, settings.model_copy(update=change)) for key, change in alternatives.items()}
    listed = ", ".join(f"{key} ({need / GIB:.1f} GiB)" for key, need in needs.items())
    return f"cheaper: {listed}" if needs else "a larger GPU is needed"
