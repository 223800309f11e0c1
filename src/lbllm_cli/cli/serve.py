"""`lbllm serve`: an OpenAI-compatible server, which is transformers' own with the plugin imported."""

import socket
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils.import_utils import is_serve_available

from lbllm_cli.core import interrupt
from lbllm_cli.core.console import say
from lbllm_cli.core.errors import Interrupted, RunError, UsageError, reason
from lbllm_cli.models.folder import resolve
from lbllm_cli.models.tokenizer import read_tokenizer
from lbllm_cli.models.whole_folder import check_folder, check_loaded
from lbllm_cli.runtime.backend import choose_device
from lbllm_cli.runtime.checks import refusing

# How often a signal is looked for.
_POLL = 0.2


def serve(model: str, host: str, port: int, device: str, trust_remote_code: bool) -> None:
    """Serves a model until SIGINT or SIGTERM. model: a folder or an id. device: as `--device` names it.

    Raises UsageError for what cannot be served or listened on, before a weight is read.
    """
    chosen = choose_device(device, "--device")
    if not is_serve_available():
        raise UsageError("a server needs fastapi, uvicorn and openai; run: pip install 'lbllm-cli[serve]'")
    folder = resolve(model, None, weights=True, key="--model")
    if "@" in str(folder):
        raise UsageError(f"--model {folder}: the server takes what is behind @ for a revision; rename the folder")
    check_folder(folder, trust_remote_code)
    tokenizer = read_tokenizer(folder, trust_remote_code)
    _check_address(host, port)
    if not tokenizer.chat_template:
        say(f"serve: {folder} has no chat template: /v1/completions alone is of use")
    with interrupt.graceful():
        server = _start(folder, host, port, chosen, trust_remote_code)
        try:
            _wait(server, folder, host, port)
        except Interrupted:
            say("serve: stopped")
        finally:
            server.kill_server()


def _check_address(host: str, port: int) -> None:
    """Raises UsageError where nothing can listen there: uvicorn says so after the model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise UsageError(f"cannot listen on {host}:{port} ({reason(error)}); choose another --port or --host") from None


def _start(folder: Path, host: str, port: int, device: torch.device, trust_remote_code: bool) -> Any:
    """transformers' server in a thread of its own, the model loaded."""
    from transformers.cli.serve import Serve

    import lbllm_cli.hf  # noqa: F401 - registers the packed format

    with refusing(folder):
        server: Any = Serve(
            force_model=str(folder), host=host, port=port, device=str(device), trust_remote_code=trust_remote_code,
            non_blocking=True,
        )  # fmt: skip
    manager = server._model_manager
    # Before transformers 5.24 it lists what lies in the hub's cache, whichever model it was given.
    served = {"id": str(folder), "object": "model", "created": int(folder.stat().st_mtime), "owned_by": "lbllm"}
    manager.get_gen_models = lambda: [served]
    try:
        for loaded in list(manager.loaded_models.values()):
            check_loaded(folder, loaded.model)
    except UsageError:
        server.kill_server()
        raise
    return server


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
