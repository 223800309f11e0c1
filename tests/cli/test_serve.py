"""`lbllm serve` through the openai client: it answers what `lbllm generate` writes, and ends when it is told to."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, TOY, write_recipe
from safetensors.torch import load_file, save_file

from lbllm_cli.cli import serve, serve_vllm
from lbllm_cli.core.errors import RunError

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
SECONDS = 120
pytestmark = pytest.mark.heavy


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Server:
    """A running one. folder: its model."""

    process: "subprocess.Popen[str]"
    folder: Path
    port: int
    log: Path

    @property
    def client(self) -> Any:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", timeout=SECONDS, max_retries=0)


def started(folder: Path, log: Path, *more: str, program: str = "lbllm_cli", said: str = "serve: http") -> Server:
    """A server of lbllm's, or of transformers' own. said: what it writes once it answers. more: options."""
    port = free_port()
    model = ["--model", str(folder)] if program == "lbllm_cli" else [str(folder)]
    command = [sys.executable, "-m", program, "serve", *model, "--port", str(port), "--device", "cpu", *more]
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, text=True, preexec_fn=heard, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    end = time.monotonic() + SECONDS
    while said not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.1)
    return Server(process, folder, port, log)


@pytest.fixture(scope="module")
def server(export_of, tmp_path_factory) -> Iterator[Server]:
    """Of a packed export with 4-bit activations, keys and values, and a chat template."""
    base = tmp_path_factory.mktemp("serve")
    shutil.copytree(export_of("llama-tied"), base / "model")
    (base / "model" / "chat_template.jinja").write_text(TEMPLATE)
    found = started(base / "model", base / "log")
    yield found
    found.process.send_signal(signal.SIGINT)
    try:
        assert found.process.wait(timeout=SECONDS) == 0
    finally:
        found.process.kill()
    log = found.log.read_text()
    assert "serve: stopped" in log
    assert "Traceback" not in log


def written(ok, server: Server, prompt: str, *more: str) -> str:
    command = ("generate", "--model", server.folder, "--prompt", prompt, "--max-new-tokens", "12", *more)
    return ok(*command).stdout.removesuffix("\n")


def test_it_lists_its_model(server):
    assert [model.id for model in server.client.models.list()] == [str(server.folder)]


def test_completions_are_what_generate_writes(server, ok):
    wanted = written(ok, server, "The sea", "--raw")
    options = {"model": str(server.folder), "prompt": "The sea", "max_tokens": 12, "temperature": 0}
    whole = server.client.completions.create(**options)
    assert whole.choices[0].text == wanted
    assert whole.usage.completion_tokens == 12
    pieces = [chunk.choices[0].text for chunk in server.client.completions.create(**options, stream=True)]
    assert "".join(pieces) == wanted
    assert len(pieces) > 3


def test_chat_goes_through_the_template(server, ok):
    wanted = written(ok, server, "hello")
    assert wanted != written(ok, server, "hello", "--raw")
    messages = [{"role": "user", "content": "hello"}]
    options = {"messages": messages, "model": str(server.folder), "max_tokens": 12, "temperature": 0}
    assert server.client.chat.completions.create(**options).choices[0].message.content == wanted
    pieces = [chunk.choices[0].delta.content or "" for chunk in server.client.chat.completions.create(**options, stream=True)]
    assert "".join(pieces) == wanted


def test_the_client_of_the_page(server, ok, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "serving.md").read_text(), flags=re.DOTALL)
    exec(code.replace("8080", str(server.port)).replace("max_tokens=64", "max_tokens=12"), {})
    assert capsys.readouterr().out == written(ok, server, "What is a comet?") + "\n"


def test_requests_that_come_together_are_answered_each_for_itself(server, ok):
    prompts = ["The sea", "A comet is", "Once", "hello there", "She was", "In the"]
    wanted = [written(ok, server, prompt, "--raw") for prompt in prompts]

    def ask(prompt: str) -> str:
        found = server.client.completions.create(model=str(server.folder), prompt=prompt, max_tokens=12, temperature=0)
        return found.choices[0].text

    with ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(ask, prompts)) == wanted


def test_activations_may_stay_in_full_precision(server, ok, tmp_path):
    def full(prompt: str) -> str:
        return written(ok, server, prompt, "--raw", "--full-activations")

    # A toy has few words: what 4 bits change may be no word of the first prompt.
    prompts = ("A comet is", "The sea", "It was a dark night, and", "water", "123")
    prompt = next(prompt for prompt in prompts if full(prompt) != written(ok, server, prompt, "--raw"))
    wanted = full(prompt)
    found = started(server.folder, tmp_path / "log", "--full-activations")
    try:
        options = {"model": str(found.folder), "prompt": prompt, "max_tokens": 12, "temperature": 0}
        assert found.client.completions.create(**options).choices[0].text == wanted
    finally:
        found.process.kill()


def test_another_model_is_refused(server):
    with pytest.raises(openai.BadRequestError) as refused:
        server.client.completions.create(model="gpt-2", prompt="x", max_tokens=1)
    assert refused.value.body["message"] == f"Server is pinned to '{server.folder}'; requested 'gpt-2'."


@pytest.mark.parametrize("path", ["/reset", "/load_model", "/v1/audio/transcriptions"])
def test_a_client_can_neither_unload_the_model_nor_load_another(server, path):
    body = json.dumps({"model": str(TOY)}).encode()
    address = f"http://127.0.0.1:{server.port}"
    request = urllib.request.Request(address + path, body, {"Content-Type": "application/json"}, method="POST")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=SECONDS)
    assert refused.value.code == 404
    body = json.dumps({"model": str(TOY), "prompt": "x", "decisions": ["a", "b"]}).encode()
    request = urllib.request.Request(f"{address}/v1/systemone", body, {"Content-Type": "application/json"}, method="POST")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=SECONDS)
    assert 400 <= refused.value.code < 500


def test_a_port_in_use_is_refused_before_the_model_is_read(server, lbllm):
    result = lbllm("serve", "--model", server.folder, "--port", str(server.port))
    assert result.exit_code == 2
    assert f"cannot listen on 127.0.0.1:{server.port} (" in result.stderr
    assert "choose another --port or --host" in result.stderr


def test_transformers_serves_a_compressed_tensors_export_by_itself(ok, finished, tmp_path):
    toy, output = finished("ptq")
    shutil.copytree(output, tmp_path / "run")
    recipe = write_recipe(tmp_path / "r.yaml", toy, tmp_path / "run")
    ok("export", "--recipe", recipe, "export.format=compressed-tensors")
    theirs = {"program": "transformers.cli.transformers", "said": "Uvicorn running on"}
    found = started(tmp_path / "run" / "export", tmp_path / "log", **theirs)
    try:
        options = {"prompt": "The sea", "max_tokens": 12, "temperature": 0}
        answer = found.client.completions.create(model=str(found.folder), **options).choices[0].text
        assert answer == written(ok, found, "The sea", "--raw")
    finally:
        found.process.kill()


def test_values_that_are_not_finite_are_refused(lbllm, toy):
    weights = load_file(toy / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, toy / "model.safetensors", {"format": "pt"})
    result = lbllm("serve", "--model", toy, "--port", str(free_port()), "--device", "cpu")
    assert result.exit_code == 2
    assert f"{toy}: model.norm.weight holds NaN or infinity" in result.stderr
    assert "serve: http" not in result.stderr


def test_a_model_without_a_template_is_said_to_have_none(lbllm, toy, monkeypatch):
    def start(*_: object) -> None:
        raise RunError("not now")

    monkeypatch.setattr(serve, "_start", start)
    result = lbllm("serve", "--model", toy, "--port", str(free_port()))
    assert result.exit_code == 1
    assert f"serve: {toy} has no chat template: /v1/completions alone is of use" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--model", "HOME"], "/runs@home: the server takes what is behind @ for a revision; rename the folder"),
        (["--model", "TOY", "--host", "256.0.0.1"], "cannot listen on 256.0.0.1:8000 ("),
        (["--model", "TOY", "--device", "cuda:7"], "--device"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(lbllm, toy, tmp_path, arguments, message):
    shutil.copytree(toy, tmp_path / "runs@home")
    meant = {"TOY": toy, "HOME": tmp_path / "runs@home"}
    result = lbllm("serve", *[meant.get(word, word) for word in arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_without_a_server_installed_the_extra_is_named(lbllm, toy, monkeypatch):
    monkeypatch.setattr(serve, "is_serve_available", lambda: False)
    result = lbllm("serve", "--model", toy)
    assert result.exit_code == 2
    assert "a server needs vLLM, or fastapi, uvicorn and openai; run: pip install vllm, or: " in result.stderr


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_vllm_that_is_not_there_is_refused(lbllm, toy):
    result = lbllm("serve", "--model", toy, "--engine", "vllm")
    assert result.exit_code == 2
    assert "--engine vllm: vLLM is not installed; run: pip install vllm" in result.stderr


def test_options_of_vllm_are_not_for_transformers(lbllm, toy):
    result = lbllm("serve", "--model", toy, "--engine", "transformers", "--", "--max-model-len", "64")
    assert result.exit_code == 2
    assert "--max-model-len 64: transformers' server takes no further options" in result.stderr


@pytest.mark.parametrize(("family", "more"), [("gpt-oss", []), ("llama-tied", ["--device", "cpu"])])
def test_what_goes_to_transformers_although_vllm_is_there(lbllm, export_of, monkeypatch, family, more):
    def start(*_: object) -> None:
        raise RunError("transformers' own")

    monkeypatch.setattr(serve_vllm, "find_spec", lambda name: True)
    monkeypatch.setattr(serve, "_start", start)
    result = lbllm("serve", "--model", export_of(family), "--port", str(free_port()), *more)
    assert result.exit_code == 1
    assert "transformers' own" in result.stderr


@pytest.mark.parametrize("own", [["--additional-config", '{"lbllm_cache": "codes"}'], ["--additional_config.lbllm_cache=codes"]])
def test_full_activations_do_not_give_way_to_a_configuration_of_the_callers(lbllm, toy, monkeypatch, own):
    monkeypatch.setattr(serve_vllm, "find_spec", lambda name: True)
    result = lbllm("serve", "--model", toy, "--port", str(free_port()), "--full-activations", "--", *own)
    assert result.exit_code == 2
    assert f"{own[0]}: leave --full-activations out" in result.stderr


def test_vllm_takes_the_place_of_the_process(lbllm, toy, monkeypatch):
    """With a stand-in for vLLM: what it is started with."""
    started = []
    monkeypatch.setattr(serve_vllm, "find_spec", lambda name: True)
    monkeypatch.setattr(serve_vllm, "_version", lambda: ("vllm", "0.32.0"))

    def become(program: str, arguments: list[str]) -> None:
        started.append((program, arguments))
        raise RunError("not now")

    monkeypatch.setattr(serve_vllm.os, "execv", become)
    port = str(free_port())
    result = lbllm("serve", "--model", toy, "--port", port, "--full-activations", "--", "--max-model-len", "64")
    assert result.exit_code == 1
    ((program, arguments),) = started
    assert program == sys.executable
    assert arguments[:5] == [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(toy)]
    options = dict(zip(arguments[5::2], arguments[6::2], strict=True))
    assert int(options.pop("--kv-cache-memory-bytes")) > 1 << 26
    assert options == {
        "--host": "127.0.0.1", "--port": port, "--served-model-name": str(toy), "--dtype": "float32",
        "--additional-config": '{"lbllm_activations": "full"}', "--max-model-len": "64",
    }  # fmt: skip
    assert f"serve: http://127.0.0.1:{port}/v1, model {toy}, vllm 0.32.0; it says when it is ready" in result.stderr
