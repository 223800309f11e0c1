"""Where a stage ran."""

import platform
from typing import Any

import torch

from lbllm_cli import __version__
from lbllm_cli.runtime.backend import backend_of


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, device and threads of this process; written beside a checkpoint, outside the promise of equal bytes."""
    import safetensors
    import transformers

    return {
        "lbllm": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
        "platform": platform.platform(),
        "device": backend_of(device).describe(device),
        "threads": torch.get_num_threads(),
        "host": platform.node(),
    }
