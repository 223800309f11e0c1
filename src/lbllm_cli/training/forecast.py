"""What the stages that train will need: masters, gradients, moments and activations, of a block."""

from collections.abc import Iterable

from lbllm_cli.models.model import SourceModel
from lbllm_cli.pipeline.forecast import activation_bytes, block_bytes
from lbllm_cli.pipeline.world import World
from lbllm_cli.recipe.schema import Recipe
from lbllm_cli.recipe.training import ActCalib, ActEndToEnd, Distill
from lbllm_cli.training.interfaces import SEQUENCES
from lbllm_cli.training.quantizers import KNEES
from lbllm_cli.training.spread import is_large, loads_of

# float32 tensors of an input's size that a quantizer keeps for its backward pass: measured 2.0, and 17.3 while knees are soft.
KEPT_DEPLOYED, KEPT_SOFT = 2.0, 20.0


def master_bytes(settings: Distill | ActCalib) -> int:
    """Of a number that is trained: float32 with AdamW's two moments, and its running mean."""
    return 16 if isinstance(settings, Distill) and settings.ema_decay is not None else 12


def owned_share(model: SourceModel, trained: Iterable[str], world: World, blocks: int = 1) -> float:
    """Of the weights of blocks that are trained together, what the rank that has most has masters of. trained: kinds of
    parameters; where masters are not spread, every rank has all."""
    if not is_large(trained):
        return 1.0
    loads = loads_of(model.linear_shapes, world.node, blocks)
    return max(loads) / sum(loads)


def masters(model: SourceModel, settings: Distill | ActCalib, group_size: int) -> tuple[float, float]:
    """Masters of a block's linears, how many are trained and how many are not; quantizers are too small to count."""
    weights = model.binarized_parameters / model.blocks
    sizes = {"levels": weights * 4 / group_size}
    # Codes that stay are packed.
    if is_large(settings.trained):
        sizes["weights"] = weights
        if isinstance(settings, Distill) and settings.parametrisation == "bitmap":
            sizes["bitmap"] = weights
    trained = sum(size for kind, size in sizes.items() if kind in settings.trained)
    return trained, sum(sizes.values()) - trained


def training_activations(model: SourceModel, rows: int, length: int) -> float:
    """What one forward pass of a block keeps for its backward pass."""
    config = model.config
    return rows * length * (14 * config.hidden_size + 5 * model.inner) * max(model.dtype.itemsize, 4)


def quantizer_activations(model: SourceModel, settings: ActCalib | ActEndToEnd, rows: int, length: int) -> float:
    """What quantizing the inputs of a block keeps for its backward pass."""
    config = model.config
    inputs = 3 * config.hidden_size + model.inner
    soft = KNEES in settings.trained and settings.soft > 0
    return (KEPT_SOFT if soft else KEPT_DEPLOYED) * 4 * rows * length * inputs


def _fused_device(model: SourceModel, settings: Distill | ActCalib, group_size: int, length: int, owned: float) -> float:
    """`training_device` where weights and quantizers are trained in kernels. owned: share of the masters that are there.

    The teacher's block, the present weights and their gradient; latents with moments and mean; levels with all of it and as they
    are stored; codes. Before that act-calib looks at some sequences at once. Counted on the shapes of three models
    (scripts/bench/device_counts.py).
    """
    config, weights, itemsize = model.config, model.binarized_parameters / model.blocks, model.dtype.itemsize
    each = master_bytes(settings)
    latents = float(weights * (each if is_large(settings.trained) else 0))
    levels = (each + 8.0) * weights * 4 / group_size
    resident = block_bytes(model) + 2 * weights * itemsize + owned * (latents + levels + weights * 0.3)
    passing = fused_activations(model, min(settings.micro_batch_size, settings.batch_size), length)
    if isinstance(settings, ActCalib):
        states = 10 * config.hidden_size + 4 * model.kv_width + 5 * model.inner
        passing = max(passing, SEQUENCES * length * 1.1 * states - weights * itemsize)
    return 1.05 * (resident + passing)


def fused_activations(model: SourceModel, rows: int, length: int) -> float:
    """What a pass of a block in kernels keeps for its way back, and the loss in float32."""
    config = model.config
    states = 14 * config.hidden_size + 5 * model.inner
    return float(rows * length * (states * model.dtype.itemsize + 12 * config.hidden_size))


def training_device(recipe: Recipe, model: SourceModel, settings: Distill | ActCalib, world: World) -> float:
    """The teacher's block; masters, their gradients, AdamW's two moments and the mean; the weights they stand for, in float32
    and in the compute dtype with a gradient; activations. Or the teacher's pass over the data, if that is more. Of the
    rank of `world` that has most masters."""
    trained, frozen = masters(model, settings, recipe.ptq.group_size)
    owned = owned_share(model, settings.trained, world)
    weights = model.binarized_parameters / model.blocks
    length = recipe.data.training.length
    current = weights * (owned * (4.0 + 1.0) + 2.0 * model.dtype.itemsize)
    fused = not (isinstance(settings, Distill) and settings.parametrisation == "bitmap")
    if fused and model.backend.kernels is not None:
        return max(_fused_device(model, settings, recipe.ptq.group_size, length, owned), teaching_device(recipe, model))
    rows = min(settings.micro_batch_size, settings.batch_size)
    passing = training_activations(model, rows, length)
    passing += quantizer_activations(model, settings, rows, length) if isinstance(settings, ActCalib) else 0
    resident = block_bytes(model) + owned * ((master_bytes(settings) + 4) * trained + 4 * frozen)
    return max(resident + current + passing, teaching_device(recipe, model))


def teaching_device(recipe: Recipe, model: SourceModel) -> float:
    """The teacher's pass over the data."""
    return 2 * block_bytes(model) + activation_bytes(model, recipe.runtime.batch_size, recipe.data.training.length)


def training_states(recipe: Recipe, model: SourceModel, settings: Distill | ActCalib, world: World) -> tuple[float, float]:
    """Bytes of a block's unfinished training, of the rank that has most and of all: masters that are trained, with moments and
    mean."""
    whole = master_bytes(settings) * masters(model, settings, recipe.ptq.group_size)[0]
    # Of what every rank has a copy of, one is kept.
    copies = world.machines if is_large(settings.trained) else 1
    return owned_share(model, settings.trained, world) * whole, copies * whole
