"""What transformers' server is asked for in vain, through its application in this process: one message each, and no traceback."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import save_toy

from lbllm_cli.cli import serve
from lbllm_cli.cli.service import Service
from lbllm_cli.models.whole_folder import check_folder

pytest.importorskip("openai")
fastapi = pytest.importorskip("fastapi")
testclient = pytest.importorskip("starlette.testclient")

LIMIT = 24
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ m.content }}{% endfor %}"
)
HELLO = [{"role": "user", "content": "hello"}]
CHAT, PLAIN, RESPONSES = "chat/completions", "completions", "responses"
Ask = Callable[..., Any]


def asking(folder: Path) -> tuple[Ask, list[str]]:
    """ask(path, **body) -> the answer of a server of the folder that listens nowhere; and the paths that it has as it starts."""
    paths: list[str] = []
    wanted = Service(str(folder), "127.0.0.1", 8000, "cpu", "transformers", full_activations=False, trust_remote_code=False)
    with pytest.MonkeyPatch.context() as patch:
        listed = lambda self: paths.extend(route.path for route in self.server.config.app.routes)  # noqa: E731
        patch.setattr("transformers.cli.serve.Serve.start_server", listed)
        server = serve._start(folder, check_folder(folder, False), wanted, torch.device("cpu"))
    client = testclient.TestClient(server.server.config.app)
    return lambda path, **body: client.post(f"/v1/{path}", json={"temperature": 0, **body}), paths


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Ask:
    """Of a model without a chat template."""
    return asking(save_toy(tmp_path_factory.mktemp("serve") / "plain", max_position_embeddings=LIMIT))[0]


@pytest.fixture(scope="module")
def ask(tmp_path_factory) -> Ask:
    """Of a model with one."""
    folder = save_toy(tmp_path_factory.mktemp("serve") / "chat", max_position_embeddings=LIMIT)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    found, paths = asking(folder)
    assert "/v1/completions" in paths
    assert "/load_model" not in paths
    return found


def refused(answer: Any) -> str:
    """The message of a refusal in OpenAI's form."""
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error == {"message": error["message"], "type": "invalid_request_error", "param": None, "code": None}
    return str(error["message"])


@pytest.mark.parametrize("more", [{}, {"stream": True}])
@pytest.mark.parametrize(("path", "body"), [(CHAT, {"messages": HELLO}), (RESPONSES, {"input": "hello"})])
def test_a_conversation_with_a_model_without_a_template(plain, path, body, more):
    assert "has no chat template, it is not made for conversations; take /v1/completions" in refused(plain(path, **body, **more))


def test_a_model_without_a_template_completes(plain):
    assert plain(PLAIN, prompt="The sea", max_tokens=2).json()["usage"]["completion_tokens"] == 2


def test_messages_that_the_template_does_not_take(ask):
    message = refused(ask(CHAT, messages=[{"role": "system", "content": "be short"}, *HELLO]))
    assert message == "the chat template cannot render the messages: no system role; mend them or chat_template"
    assert "Cannot apply chat template to an empty conversation" in refused(ask(CHAT, messages=[]))
    assert ask(CHAT, messages=HELLO, max_tokens=2).status_code == 200


def test_a_request_brings_no_template(ask):
    own = {"chat_template": "{{ 'a' * 10 }}"}
    message = "chat_template_kwargs: a request brings no chat_template; leave it out"
    assert refused(ask(CHAT, messages=HELLO, chat_template_kwargs=own)) == message
    assert ask(CHAT, messages=HELLO, max_tokens=2, chat_template_kwargs={"enable_thinking": False}).status_code == 200


@pytest.mark.parametrize(
    ("path", "body"), [(PLAIN, {"prompt": "The sea"}), (CHAT, {"messages": HELLO}), (RESPONSES, {"input": "a"})]
)
def test_a_temperature_is_drawn_with(ask, path, body):
    """The toy's generation_config says nothing of it."""
    length = {"max_output_tokens" if path == RESPONSES else "max_tokens": 6, "stream": False}

    def texts(**wanted: float) -> set[str]:
        answers = [ask(path, **body, **length, **wanted, seed=seed).json() for seed in range(4)]
        return {json.dumps(found["output"][0]["content"] if path == RESPONSES else found["choices"]) for found in answers}

    assert len(texts(temperature=1.5)) > 1
    assert len(texts(temperature=None, top_p=0.99)) > 1
    assert len(texts(temperature=0, top_p=0.99)) == len(texts()) == 1


@pytest.mark.parametrize("more", [{}, {"stream": True}])
@pytest.mark.parametrize(
    ("path", "body"),
    [(PLAIN, {"prompt": ""}), (PLAIN, {}), (CHAT, {"messages": [{**HELLO[0], "content": ""}]}), (RESPONSES, {"input": ""})],
)
def test_an_empty_prompt(ask, path, body, more):
    message = "the prompt is empty, and the tokenizer has nothing that it begins with; give some text"
    assert refused(ask(path, **body, **more)) == message


@pytest.mark.parametrize("more", [{}, {"stream": True}])
@pytest.mark.parametrize(
    ("path", "body"),
    [(PLAIN, {"prompt": "The sea " * LIMIT}), (CHAT, {"messages": [{**HELLO[0], "content": "The sea " * LIMIT}]})],
)
def test_a_prompt_that_the_model_has_no_positions_for(ask, path, body, more):
    message = refused(ask(path, **body, **more))
    assert message.startswith("the prompt has ")
    assert message.endswith(f" tokens, the model has {LIMIT} positions; shorten it")


@pytest.mark.parametrize("more", [{}, {"max_tokens": 10**9}, {"generation_config": json.dumps({"max_length": 10**9})}])
def test_a_text_ends_at_the_models_last_position(ask, more):
    found = ask(PLAIN, prompt="The sea", **more).json()
    assert found["usage"]["total_tokens"] == LIMIT
    assert found["choices"][0]["finish_reason"] == "length"


def test_a_streamed_answer_ends_there_too(ask):
    *_, last, end = ask(CHAT, messages=HELLO, max_tokens=10**9, stream=True).text.split("data: ")
    found = json.loads(last if end.startswith("[DONE]") else end)
    assert found["usage"]["total_tokens"] == LIMIT
    assert found["choices"][0]["finish_reason"] == "length"


def test_no_tokens_are_asked_for(ask):
    message = "0 tokens are asked for; expected max_tokens of 1 or more"
    assert refused(ask(PLAIN, prompt="The sea", max_tokens=0)) == message


@pytest.mark.parametrize(
    ("limit", "new", "whole", "expected"),
    [(8, 3, None, 3), (8, 9, None, 5), (8, None, None, 5), (8, None, 5, 2), (None, 9, 20, 9), (None, None, None, 128)],
)
def test_how_many_tokens_are_written(limit, new, whole, expected):
    """Behind three."""
    from lbllm_cli.cli import serve_requests

    settings = SimpleNamespace(max_new_tokens=new, max_length=whole)
    serve_requests.Texts(limit, 16)._bound({"input_ids": torch.tensor([[1, 2, 3]])}, settings)
    assert (settings.max_new_tokens, settings.max_length) == (expected, None)


def test_another_model_is_loaded_for_nobody():
    """Whichever part of the server asks."""
    from lbllm_cli.cli import serve_requests

    asked = []
    manager = SimpleNamespace(loaded_models={"/m@main": 1}, load_model_and_processor=lambda *a, **k: asked.append((a, k)))
    app = SimpleNamespace(router=SimpleNamespace(routes=[SimpleNamespace(path="/reset"), SimpleNamespace(path="/health")]))
    server = SimpleNamespace(_model_manager=manager, server=SimpleNamespace(config=SimpleNamespace(app=app)))
    serve_requests._keep_to(server, Path("/m"))
    assert [route.path for route in app.router.routes] == ["/health"]
    manager.load_model_and_processor("/m@main", progress_callback=None)
    assert asked == [(("/m@main",), {"progress_callback": None})]
    for arguments, options in ((("/other@main",), {}), (("/m@main",), {"gguf_file": "x.gguf"})):
        with pytest.raises(fastapi.HTTPException, match="this server has the model /m and no other"):
            manager.load_model_and_processor(*arguments, **options)
    assert len(asked) == 1
