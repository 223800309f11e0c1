"""Floats of safetensors files: their dtypes, and whether they are finite."""

import torch
from torch import Tensor

DISK_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


def finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite. Takes no memory beside the tensor."""
    return first_not_finite({"": tensor}) is None


def first_not_finite(tensors: dict[str, Tensor]) -> str | None:
    """Name of the first tensor that holds NaN or infinity, None where none does; all of one device, which is waited for once."""
    checked = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel()}
    if not checked:
        return None
    # In float64 all dtypes are what they are.
    extremes = [torch.stack(torch.aminmax(tensor.detach())).double() for tensor in checked.values()]
    good = torch.stack(extremes).isfinite().all(1).tolist()
    return next((name for name, well in zip(checked, good, strict=True) if not well), None)
