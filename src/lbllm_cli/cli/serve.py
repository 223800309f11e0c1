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
# Of transformers' server: what loads and unloads models, and what none of ours can answer.
_CLOSED = {"/load_model", "/reset", "/v1/audio/transcriptions"}


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
            "a server needs vLLM, or fastapi, uvicorn and openai; run: pip install vllm, or: pip install 'lbllm-cli[serve]'"
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

    from lbllm_cli.hf import quantize_activations  # it registers the packed format

    with refusing(folder):
        server: Any = Serve(
            force_model=str(folder), host=wanted.host, port=wanted.port, device=str(device),
            attn_implementation=config.get_text_config()._attn_implementation, trust_remote_code=wanted.trust_remote_code,
            non_blocking=True,
        )  # fmt: skip
    manager = server._model_manager
    _keep_to(server, folder)
    # Before transformers 5.24 it lists what lies in the hub's cache, whichever model it was given.
    served = {"id": str(folder), "object": "model", "created": int(folder.stat().st_mtime), "owned_by": "lbllm"}
    manager.get_gen_models = lambda: [served]
    try:
        for loaded in list(manager.loaded_models.values()):
            check_loaded(folder, loaded.model)
            quantize_activations(loaded.model, not wanted.full_activations)
    except UsageError:
        server.kill_server()
        raise
    return server


def _keep_to(server: Any, folder: Path) -> None:
    """Lets a server have the model that it has, and no other: any client could have it load a folder of this machine or of the
    hub, whose code might run, or unload its own, which would come back as it is stored and not as it was asked for.
    """
    from fastapi import HTTPException

    manager, app = server._model_manager, server.server.config.app
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", "") not in _CLOSED]
    own, real = set(manager.loaded_models), manager.load_model_and_processor

    def loaded(name: str, *arguments: Any, gguf_file: str | None = None, **options: Any) -> Any:
        if name not in own or gguf_file is not None:
            raise HTTPException(status_code=404, detail=f"this server has the model {folder} and no other")
        return real(name, *arguments, **options)

    manager.load_model_and_processor = loaded


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
