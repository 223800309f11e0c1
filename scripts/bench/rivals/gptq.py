"""GPTQ as llm-compressor has it: two bits, asymmetric, a scale and a zero point per group, otherwise its defaults."""

from functools import partial

import torch
from ground import Ground, Made, Rival
from torch import Tensor
from uniform import BITS, on_grid, uniform_bits


def make(group: int, observer: str, ground: Ground) -> Made:
    """All block linears, in the order of the blocks, each calibrated behind those that are quantized already."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(ground.model.folder, dtype=torch.float32)
    rows = {"input_ids": ground.calibration.tolist(), "attention_mask": torch.ones_like(ground.calibration).tolist()}
    codes = {"num_bits": BITS, "type": "int", "symmetric": False, "strategy": "group", "group_size": group, "observer": observer}
    scheme = {"group_0": {"targets": ["Linear"], "weights": codes}}
    count, length = ground.calibration.shape
    oneshot(
        model=model,
        dataset=Dataset.from_dict(rows),
        recipe=GPTQModifier(config_groups=scheme, ignore=["lm_head"]),
        num_calibration_samples=count,
        max_seq_length=length,
        shuffle_calibration_samples=False,
    )
    found = {name: _stored(model.get_submodule(name.removesuffix(".weight"))) for name in ground.model.binarized_names}
    return Made(found, f"{count} x {length} tokens; ranges by {observer}")


def _stored(linear: torch.nn.Module) -> Tensor:
    """Its codes are -2 to 1."""
    values = dict(linear.named_parameters()) | dict(linear.named_buffers())
    zero = values["weight_zero_point"] + 2 ** (BITS - 1)
    return on_grid(values["weight"].detach(), values["weight_scale"].detach(), zero.detach()).values()


# Its own choice is the range from least to greatest weight of a group, of which two bits leave little; the other searches a
# narrower one.
RIVALS = {
    name: Rival(uniform_bits(group), f"2 + (16 + 2) / {group}", partial(make, group, observer))
    for name, group, observer in (
        ("GPTQ g64", 64, "memoryless_minmax"),
        ("GPTQ g32", 32, "memoryless_minmax"),
        ("GPTQ g64 mse", 64, "memoryless_mse"),
        ("GPTQ g32 mse", 32, "memoryless_mse"),
    )
}
