"""Random W(1+1)A4KV4 models of two layers, without files: what loading an export makes of one, in torch."""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lbllm_cli.format.activations import ActivationFormat, Tables, uniform_levels
from lbllm_cli.format.levels import project_levels
from lbllm_cli.format.weights import PARTS, PackedWeight, pack_codes
from lbllm_cli.runtime.attachments import attach
from lbllm_cli.runtime.kv_cache import keep_quantized
from lbllm_cli.runtime.linear import PackedLinear
from lbllm_cli.runtime.quantizer import ActQuantizer, empty_quantizer, quantizer_widths
from lbllm_cli.training.knees import Shape, tables_of

UNITS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)  # fmt: skip
# No width is a multiple of the group, 32.
SMALL = {
    "vocab_size": 96, "hidden_size": 72, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "head_dim": 16, "tie_word_embeddings": False, "bos_token_id": 0,
    "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
KNEE = tables_of([Shape(3, 4, 4, 4, 5, 6), Shape(5, 6, 2, 2, 3, 3)])
UNIFORM = Tables(uniform_levels(4), None, torch.tensor([[1.0, 0.9]]))
GROUP = 32


def weights_like(dense: torch.Tensor, group: int = GROUP, bits: int = 8) -> PackedWeight:
    """Codes and levels of a weight [out, in]: about its quartiles, by hand. Levels of 2 bits: all of the table, in turn."""
    out, inn = dense.shape
    codes = torch.bucketize(dense, dense.std() * torch.tensor([-0.9, 0.0, 0.9])).to(torch.uint8)
    packed = pack_codes(codes, group)
    if bits == 2:
        places = torch.arange(out * packed.shape[1]).remainder(256).to(torch.uint8).view(out, -1, 1)
        return PackedWeight.of_stored(packed, places, (dense.std() / 64).half().expand(out, 1).contiguous(), inn)
    spread = dense.std() * torch.tensor([-1.5, -0.45, 0.45, 1.5]) * torch.linspace(0.7, 1.3, packed.shape[1]).unsqueeze(1)
    levels, scale = project_levels(spread.expand(out, -1, -1).contiguous())
    return PackedWeight(packed, levels, scale, inn)


def packed_linear(dense: nn.Linear, group: int = GROUP, bits: int = 8) -> PackedLinear:
    packed = PackedLinear(dense.in_features, dense.out_features, group, dense.bias is not None, bits)
    for part, tensor in zip(PARTS, weights_like(dense.weight.detach().float(), group, bits).stored, strict=True):
        setattr(packed, part, tensor)
    if dense.bias is not None:
        packed.bias.data = dense.bias.data.clone()
    return packed


def packed_toy(
    family: str = "llama", form: str = "knee", granularity: str = "group", groups: tuple[int, ...] = (), **changes
) -> nn.Module:
    """A model in float32 on the CPU, its linears packed and its quantizers in place. groups: of each layer, levels of 2 bits."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SMALL, **changes})).eval()
        for name, tensor in model.named_parameters():
            tensor.requires_grad_(False)
            if name.endswith("bias"):
                tensor.normal_(0, 0.1)
            elif "norm" in name:
                tensor.uniform_(0.5, 1.5)
            else:
                tensor.mul_(4)  # the default 0.02 makes a model whose blocks do next to nothing
    tables = KNEE if form == "knee" else UNIFORM
    layout = ActivationFormat(4, 4, granularity, form, form, 2, GROUP)
    for number, layer in enumerate(model.get_decoder().layers):
        by: dict[str, nn.Module] = {}
        for name, width in quantizer_widths(layer, UNITS).items():
            like = empty_quantizer(layout, name, width)
            by[name] = ActQuantizer(tables, like.size, like.step_dtype)
            layer.get_submodule(name.rpartition(".")[0]).add_module(name.rpartition(".")[2], by[name])
        for linear in (linear for unit in UNITS for linear in unit):
            module = layer.get_submodule(linear)
            packed = packed_linear(module, groups[number], 2) if groups else packed_linear(module)
            for child, quantizer in module.named_children():
                packed.add_module(child, quantizer)
            layer.set_submodule(linear, packed)
        attach(layer, UNITS, by)
    keep_quantized(model)
    return model
