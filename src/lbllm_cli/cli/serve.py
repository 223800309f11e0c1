"""`lbllm serve`: an OpenAI-compatible server, vLLM's where that is installed, else transformers' own with the plugin imported."""

import socket
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils.import_utils import is_serve_available

from lbllm_cli.cli import serve_vllm
from lbllm_cli.cli.service import Service
from lbllm_cli.core import interrupt
from lbllm_cli.core.console import say
from lbllm_cli.core.errors import Interrupted, RunError, UsageError, reason
from lbllm_cli.core.model_folder import resolve
from lbllm_cli.models.tokenizer import read_tokenizer
from lbllm_cli.models.whole_folder import check_folder, check_loaded
from lbllm_cli.runtime.backend import choose_device
from lbllm_cli.runtime.checks import refusing

# How often a signal is looked for.
_POLL = 0.2


def serve(wanted: Service) -> None:
    """Serves a model until SIGINT or SIGTERM; vLLM takes the place of this process.

    Raises UsageError for what cannot be served or listened on, before a weight is read.
    """
    chosen = choose_device(wanted.device, "--device")
    folder = resolve(wanted.model, None, weights=True, key="--model")
    config = check_folder(folder, wanted.trust_remote_code)
    tokenizer = read_tokenizer(folder, wanted.trust_remote_code)
    engine = _engine(wanted, config)
    if engine == "transformers" and "@" in str(folder):
        raise UsageError(f"--model {folder}: the server takes what is behind @ for a revision; rename the folder")
    _check_address(wanted.host, wanted.port)
    if not tokenizer.chat_template:
        say(f"serve: {folder} has no chat template: /v1/completions alone is of use")
    if engine == "vllm":
        serve_vllm.take_over(folder, wanted, chosen)
    with interrupt.graceful():
        server = _start(folder, config, wanted, chosen)
        try:
            _wait(server, folder, wanted.host, wanted.port)
        except Interrupted:
            say("serve: stopped")
        finally:
            server.kill_server()


def _engine(wanted: Service, config: Any) -> str:
    """The engine that is to serve. Raises UsageError where it is not there, or cannot serve a model of this configuration."""
    missing = serve_vllm.missing(config)
    if wanted.engine == "vllm" or (wanted.engine == "auto" and wanted.device == "auto" and not missing):
        if missing:
            raise UsageError(f"--engine vllm: {missing}")
        if wanted.device != "auto":
            raise UsageError(f"--device {wanted.device}: vLLM is built for one kind of device and takes it; leave --device out")
        return "vllm"
    if wanted.more:
        raise UsageError(f"{' '.join(wanted.more)[:80]}: transformers' server takes no further options; see lbllm serve --help")
    if not is_serve_available():
        raise UsageError(
            "a server needs vLLM, or fastapi, uvicorn and openai; run: pip install vllm, or: pip install fastapi uvicorn openai"
        )
    return "transformers"


def _check_address(host: str, port: int) -> None:
    """Raises UsageError where nothing can listen there: uvicorn says so after the model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise UsageError(f"cannot listen on {host}:{port} ({reason(error)}); choose another --port or --host") from None


def _start(folder: Path, config: Any, wanted: Service, device: torch.device) -> Any:
    """transformers' server in a thread of its own, the model loaded. config: as `check_folder` gives it."""
    from transformers.cli.serve import Serve

    from lbllm_cli.cli.serve_requests import hold
    from lbllm_cli.hf import quantize_activations  # it registers the packed format

    class Held(Serve):  # type: ignore[misc]
        def start_server(self) -> None:
            """Called once the model is loaded, and before anyone can ask for it."""
            for loaded in self._model_manager.loaded_models.values():
                check_loaded(folder, loaded.model)
                quantize_activations(loaded.model, not wanted.full_activations)
            hold(self, folder, config)
            super().start_server()

    with refusing(folder):
        return Held(
            force_model=str(folder), host=wanted.host, port=wanted.port, device=str(device),
            attn_implementation=config.get_text_config()._attn_implementation, trust_remote_code=wanted.trust_remote_code,
            non_blocking=True,
        )  # fmt: skip


def _wait(server: Any, folder: Path, host: str, port: int) -> None:
    """Until a signal. Raises Interrupted then, and RunError where the server ended by itself."""
    while not server.server.started:
        interrupt.check()
        _check_alive(server)
        time.sleep(_POLL)
    say(f"serve: http://{host}:{port}/v1, model {folder}, transformers {transformers.__version__}; Ctrl-C stops it")
    while True:
        interrupt.check()
        _check_alive(server)
        time.sleep(_POLL)


def _check_alive(server: Any) -> None:
    if not server._thread.is_alive():
        raise RunError("the server ended; its own messages are above")
