"""What measuring will need."""

from dataclasses import replace

from lbllm_cli.export.forecast import export_need
from lbllm_cli.models.model import SourceModel
from lbllm_cli.pipeline.forecast import Need, activation_bytes, block_bytes, host_bytes, outer_bytes, streams_place
from lbllm_cli.pipeline.world import World
from lbllm_cli.recipe.schema import Recipe


def eval_need(
    recipe: Recipe, model: SourceModel, segments: dict[str, int], checkpoints: int, world: World | None = None
) -> Need:
    """Need of `lbllm eval` block by block, of the rank that needs most.

    segments: name -> segments of an evaluation set, for those that leave it to the text. checkpoints: that are measured at once.
    world: ranks, default one.
    """
    world = world or World()
    counts = [(item.segments or segments.get(item.name, 0), item.length) for item in recipe.data.evaluation]
    row = model.config.hidden_size * model.dtype.itemsize * max(2, checkpoints)
    one = float(sum(world.most(count) * length for count, length in counts) * row)
    every = float(sum(count * length for count, length in counts) * row)
    longest = max(item.length for item in recipe.data.evaluation)
    device = 3 * block_bytes(model) + activation_bytes(model, recipe.runtime.batch_size, longest)
    device = max(device, outer_bytes(model) + 5 * 256 * model.config.vocab_size * 4)
    place = streams_place(recipe, model, device, one, world.node)
    ram = host_bytes(model, device) + (one if place == "ram" else 0)
    device += one if place == "device" else 0
    return Need("eval", device, ram, every if place == "disk" else 0, one, place, world=world)


def whole_model_need(recipe: Recipe, model: SourceModel, need: Need) -> Need:
    """Need of `lbllm eval` where lm-eval tasks or an export are measured, which take a model that is whole in memory.

    A stage is written for them as a packed export, which is deleted afterwards.
    """
    length = max(item.length for item in recipe.data.evaluation)
    whole = model.count(list(model.shapes)) * model.dtype.itemsize + activation_bytes(model, recipe.eval.batch_size, length)
    device = max(need.device, whole)
    ram = max(need.ram, host_bytes(model, whole))
    return replace(need, device=device, ram=ram, disk=need.disk + export_need(recipe, model).disk)
