"""What clients of transformers' server may ask for: the model that it has, and no more text than that has positions for.

transformers answers much of the rest with a 500 and a traceback, and writes on beyond a model's last position.
"""

from pathlib import Path
from typing import Any

from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as Refusal
from transformers import PretrainedConfig
from transformers.cli.serving.utils import GenerateManager

from lbllm_cli.core.errors import UsageError, reason
from lbllm_cli.models.config import positions
from lbllm_cli.models.prompts import USUAL_TOKENS, left

# What loads and unloads models, and what none of ours can answer.
_CLOSED = {"/load_model", "/reset", "/v1/audio/transcriptions"}
_BAD_REQUEST = 400


def hold(server: Any, folder: Path, config: PretrainedConfig) -> None:
    """Before a server listens, its model loaded: sets what may be asked of it, and in which form it refuses the rest.

    server: transformers' Serve. config: as `check_folder` gives it.
    """
    _keep_to(server, folder)
    manager, app = server._model_manager, server.server.config.app
    # Before transformers 5.24 it lists what lies in the hub's cache, whichever model it was given.
    served = {"id": str(folder), "object": "model", "created": int(folder.stat().st_mtime), "owned_by": "lbllm"}
    manager.get_gen_models = lambda: [served]
    for handler in (server._chat_handler, server._completion_handler, server._response_handler):
        _draw(handler)
    for loaded in manager.loaded_models.values():
        _refuse_messages(loaded.processor, folder)
    texts = Texts(positions(config), int(config.get_text_config().vocab_size))
    server._generation_state.get_manager = lambda model_id, use_cb=False: texts
    app.add_exception_handler(Refusal, _answer)


def _keep_to(server: Any, folder: Path) -> None:
    """Lets a server have the model that it has, and no other: any client could have it load a folder of this machine or of the
    hub, whose code might run, or unload its own, which would come back as it is stored and not as it was asked for.
    """
    manager, app = server._model_manager, server.server.config.app
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", "") not in _CLOSED]
    own, real = set(manager.loaded_models), manager.load_model_and_processor

    def loaded(name: str, *arguments: Any, gguf_file: str | None = None, **options: Any) -> Any:
        if name not in own or gguf_file is not None:
            raise HTTPException(status_code=404, detail=f"this server has the model {folder} and no other")
        return real(name, *arguments, **options)

    manager.load_model_and_processor = loaded


def _draw(handler: Any) -> None:
    """Has a request that names a temperature or top_p drawn from, as clients of OpenAI's expect: transformers 5.23 sets both, and
    takes the likeliest token all the same where the model's own generation_config does.
    """
    real = handler._build_generation_config

    def built(body: dict[str, Any], *arguments: Any, **options: Any) -> Any:
        found = real(body, *arguments, **options)
        named = [body.get(key) for key in ("temperature", "top_p")]
        if body.get("generation_config") is None and any(value is not None for value in named) and named[0] != 0:
            found.do_sample = True
        return found

    handler._build_generation_config = built


def _refuse_messages(processor: Any, folder: Path) -> None:
    """Has a tokenizer or processor refuse messages that it cannot make a text of, each request by itself."""
    real = processor.apply_chat_template

    def rendered(*arguments: Any, **options: Any) -> Any:
        if options.get("chat_template") is not None:
            # A template is a program, and takes what memory and time it likes.
            raise HTTPException(_BAD_REQUEST, "chat_template_kwargs: a request brings no chat_template; leave it out")
        try:
            return real(*arguments, **options)
        except Exception as error:  # a template is a program: it raises what it likes
            message = f"the chat template cannot render the messages: {reason(error)}; mend them or chat_template"
            if not processor.chat_template:
                message = f"{folder} has no chat template, it is not made for conversations; take /v1/completions"
            raise HTTPException(_BAD_REQUEST, message) from None

    processor.apply_chat_template = rendered


class Texts(GenerateManager):  # type: ignore[misc]
    """Writes texts one after another, none beyond the model's last position.

    Here a request is tokens, and nothing is answered yet: a stream that has begun has no status to refuse with. limit, vocab: as
    `models.prompts.left` takes them.
    """

    def __init__(self, limit: int | None, vocab: int):
        super().__init__()
        self._limit, self._vocab = limit, vocab

    def generate_streaming(self, model: Any, processor: Any, inputs: Any, gen_config: Any, *rest: Any, **options: Any) -> Any:
        """As transformers'. Raises HTTPException for a prompt that cannot be continued."""
        self._bound(inputs, gen_config)
        return super().generate_streaming(model, processor, inputs, gen_config, *rest, **options)

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *rest: Any, **options: Any
    ) -> Any:
        """As transformers'. Raises HTTPException for a prompt that cannot be continued."""
        self._bound(inputs, gen_config)
        return await super().generate_non_streaming(model, processor, inputs, gen_config, *rest, **options)

    def _bound(self, inputs: Any, gen_config: Any) -> None:
        """Cuts how many tokens are written to what there is room for; the answer then says that it ended for its length."""
        tokens = [int(token) for token in inputs["input_ids"].flatten()]
        try:
            room = left(self._limit, self._vocab, tokens, "the prompt")
        except UsageError as error:
            raise HTTPException(_BAD_REQUEST, str(error)) from None
        # A request may bring a generation_config of its own, which counts the prompt's tokens or nothing.
        wanted, whole = gen_config.max_new_tokens, gen_config.max_length
        if wanted is None:
            wanted = USUAL_TOKENS if whole is None else whole - len(tokens)
        if wanted < 1:
            raise HTTPException(_BAD_REQUEST, f"{wanted} tokens are asked for; expected max_tokens of 1 or more")
        gen_config.max_new_tokens, gen_config.max_length = wanted if room is None else min(wanted, room), None


async def _answer(request: Request, error: Any) -> JSONResponse:
    """A refusal in the form that clients of OpenAI's read: ours, transformers' and those of paths that are not there."""
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    body = {"message": str(error.detail), "type": kind, "param": None, "code": None}
    return JSONResponse({"error": body}, error.status_code, error.headers)
