"""What an end-to-end phase will need."""

from lbllm_cli.end_to_end.loss import LOGITS
from lbllm_cli.format.levels import per_row
from lbllm_cli.models.model import SourceModel
from lbllm_cli.pipeline.forecast import (
    PROCESS,
    Need,
    activation_bytes,
    block_bytes,
    checkpoint_bytes,
    host_bytes,
    outer_bytes,
    sampling_bytes,
)
from lbllm_cli.pipeline.world import World
from lbllm_cli.recipe.schema import Recipe
from lbllm_cli.recipe.training import ActEndToEnd, EndToEnd
from lbllm_cli.training.forecast import fused_activations, owned_share, quantizer_activations, training_activations
from lbllm_cli.training.spread import is_large


def _passing_bytes(recipe: Recipe, model: SourceModel, settings: EndToEnd) -> float:
    """What a block of an end-to-end phase keeps for its backward pass, decoded weights included."""
    length, rows = recipe.data.training.length, min(settings.micro_batch_size, settings.batch_size)
    weights = model.binarized_parameters / model.blocks
    if model.backend.kernels is not None:
        # The loss in float32 is of the last states alone; what quantizers keep is about as much.
        loss = 0 if isinstance(settings, ActEndToEnd) else rows * length * 12 * model.config.hidden_size
        return weights * model.dtype.itemsize + fused_activations(model, rows, length) - loss
    kept = weights * (1 + model.dtype.itemsize) + training_activations(model, rows, length)
    return kept + (quantizer_activations(model, settings, rows, length) if isinstance(settings, ActEndToEnd) else 0)


def _trained_levels(recipe: Recipe, model: SourceModel, settings: EndToEnd) -> float:
    """Levels, or scales of them, that are trained."""
    levels = model.binarized_parameters * 4 / recipe.ptq.group_size
    scales = sum(out for out, _ in model.binarized_shapes) if per_row(recipe.ptq.level_bits) else levels / 4
    return float(scales if "scales" in settings.trained else levels if "levels" in settings.trained else 0)


def _resident_bytes(recipe: Recipe, model: SourceModel, settings: EndToEnd, world: World) -> float:
    """Packed codes, masters of levels with gradient and two moments, embedding and head; where codes are trained latents with two
    moments, weights with their gradients, and levels as they are stored, in torch codes that a step has found. Of the rank of
    `world` that has most."""
    weights, itemsize, fused = model.binarized_parameters, model.dtype.itemsize, model.backend.kernels is not None
    levels, latents = weights * 4 / recipe.ptq.group_size, "weights" in settings.trained
    owned = owned_share(model, settings.trained, world, model.blocks)
    # Masters are at their owners, weights and their gradients everywhere.
    held = weights * (owned * (12 + (0 if fused else 1)) + 2 * itemsize) if latents else weights / 4
    # Where a row's scale alone is trained, levels stay int8.
    each = 1 if per_row(recipe.ptq.level_bits) and "scales" in settings.trained else 4
    each += 4 if latents and fused else 0
    resident = held + owned * (each * levels + 12 * _trained_levels(recipe, model, settings))
    return resident + model.count(model.outer_names()) * itemsize


def recomputes(recipe: Recipe, model: SourceModel, settings: EndToEnd, world: World) -> bool:
    """Whether an end-to-end phase computes blocks again on the way back: as the recipe says, or by the memory that is free beside
    what is trained."""
    if settings.recompute != "auto":
        return settings.recompute == "always"
    free = model.backend.free_memory(model.device) - _resident_bytes(recipe, model, settings, world)
    return model.blocks * _passing_bytes(recipe, model, settings) > free / 2


def end_to_end_need(recipe: Recipe, model: SourceModel, settings: EndToEnd, recomputed: bool, world: World) -> Need:
    """Need of an end-to-end phase: the rule of one block on the device does not hold there. Its `stage` is for the caller to say.
    world: ranks, of which it is the one that needs most.

    Beside what is resident, with recomputation one block at a time keeps what its backward pass needs, and of all others the
    inputs are kept. The loss takes four tensors of logits. The teacher went ahead block by block.
    """
    length, rows = recipe.data.training.length, min(settings.micro_batch_size, settings.batch_size)
    weights, itemsize = model.binarized_parameters, model.dtype.itemsize
    passing = (1 if recomputed else model.blocks) * _passing_bytes(recipe, model, settings)
    passing += model.blocks * rows * length * model.config.hidden_size * itemsize
    # In torch weights are decoded in several steps.
    passing += 8 * weights / model.blocks if model.backend.kernels is None else 0
    latents, owned = weights if "weights" in settings.trained else 0, owned_share(model, settings.trained, world, model.blocks)
    loss = 4.0 * 4 * max(LOGITS, model.config.vocab_size)
    teaching = outer_bytes(model) + 2 * block_bytes(model) + activation_bytes(model, recipe.runtime.batch_size, length)
    # Counted at the shape of LLaMA-2-7B (scripts/bench/device_counts.py): 1.12 of the peak where codes stay, else 1.01.
    training = (1.05 if latents else 1.0) * (_resident_bytes(recipe, model, settings, world) + passing + loss)
    device = max(training, teaching)
    row = length * model.config.hidden_size * itemsize
    one, states = float(world.most(settings.sequences) * row), float(settings.sequences * row)
    state = 12.0 * (_trained_levels(recipe, model, settings) + latents)
    blocks = checkpoint_bytes(model, model.group_sizes(recipe.ptq), recipe.ptq.level_bits)
    ram = host_bytes(model, device, state * owned)
    if any(item.sampled for item in settings.source or recipe.data.training.source):
        whole = sampling_bytes(model, settings.sequences, length)
        ram = max(ram, PROCESS + whole)
        # On a GPU the file stays in RAM.
        device = device if model.backend.shares_ram else max(device, whole - 2.0 * model.count(list(model.shapes)))
    written = (model.blocks + 1) * states + blocks
    cheaper = "set end_to_end.recompute: always and micro_batch_size: 1, or train: [scales, norms]"
    # The teacher's pass holds a block's inputs beside its outputs; training has its outputs alone.
    own = blocks + 2 * state * (world.machines if is_large(settings.trained) else 1)
    elsewhere = float(2 * min(states, one * world.node)) if settings.teacher else 0.0
    state *= owned
    disk = own if settings.teacher else max(2 * states, own + states)
    return Need(
        "", device, ram, disk, one, "disk", written, state, recipe.runtime.save_minutes, cheaper, elsewhere, world=world
    )  # fmt: skip
