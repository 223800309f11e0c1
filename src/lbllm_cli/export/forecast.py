"""What an export will need."""

from lbllm_cli.export.base import Form
from lbllm_cli.export.formats import exporter
from lbllm_cli.models.model import EMBEDDING, HEAD, SourceModel
from lbllm_cli.pipeline.forecast import PROCESS, Need, block_bytes
from lbllm_cli.recipe.schema import Recipe


def export_need(recipe: Recipe, model: SourceModel) -> Need:
    """Need of `lbllm export`."""
    binarized = set(model.binarized_names)
    rest = model.count([name for name in model.shapes if name not in binarized]) * 2.0
    if Form.of(recipe).head_bits == 8:
        tables = [name for name in (EMBEDDING, HEAD) if name in model.shapes]
        rest += 2.0 * sum(model.shapes[name][0] for name in tables) - model.count(tables)
    disk = rest + exporter(recipe.export.format).weight_bytes(model, model.group_sizes(recipe.ptq), recipe.ptq.level_bits)
    ram = PROCESS + min(recipe.export.shard_gb * 1e9, disk) + block_bytes(model)
    return Need("export", 0.0, ram, disk, 0.0, "ram")
