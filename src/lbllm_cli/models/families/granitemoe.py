"""Granite 3 mixtures of experts: scaled as Granite, and files have all experts in one tensor."""

from dataclasses import replace

from lbllm_cli.core.headers import Part
from lbllm_cli.models.families import granite

FAMILY = replace(
    granite.FAMILY,
    model_type="granitemoe",
    text="Granite 3 MoE",
    stored={
        "block_sparse_moe.router.weight": Part("block_sparse_moe.router.layer.weight"),
        "block_sparse_moe.experts.{e}.gate_proj.weight": Part("block_sparse_moe.input_linear.weight", half=0),
        "block_sparse_moe.experts.{e}.up_proj.weight": Part("block_sparse_moe.input_linear.weight", half=1),
        "block_sparse_moe.experts.{e}.down_proj.weight": Part("block_sparse_moe.output_linear.weight"),
    },
)
