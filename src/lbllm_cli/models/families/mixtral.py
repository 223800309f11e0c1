"""Mixtral: files have other names for experts and router."""

from lbllm_cli.core.headers import Part
from lbllm_cli.models.families import Family

FAMILY = Family(
    "mixtral",
    "Mixtral",
    stored={
        "mlp.gate.weight": Part("block_sparse_moe.gate.weight"),
        "mlp.experts.{e}.gate_proj.weight": Part("block_sparse_moe.experts.{e}.w1.weight"),
        "mlp.experts.{e}.up_proj.weight": Part("block_sparse_moe.experts.{e}.w3.weight"),
        "mlp.experts.{e}.down_proj.weight": Part("block_sparse_moe.experts.{e}.w2.weight"),
    },
)
