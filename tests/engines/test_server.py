"""`lbllm serve` on vLLM, through the openai client: it answers what `lbllm generate` writes.

vLLM lives in an environment of its own: `make serve-test`.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import openai
import psutil
import pytest
from conftest import save_toy
from named_vllm import named_vllm
from packed_models import exported

pytest.importorskip("vllm", reason="vLLM is not installed here: make serve-test")

pytestmark = pytest.mark.slow
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
SECONDS = 400
PORT = 18431


class Served(NamedTuple):
    """A running server. folder: its model."""

    process: "subprocess.Popen[str]"
    folder: Path
    log: Path
    port: int

    @property
    def client(self) -> Any:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", timeout=SECONDS, max_retries=0)


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Path:
    """A packed export with 4-bit activations, keys and values, and a chat template."""
    base = tmp_path_factory.mktemp("serve")
    folder = exported(base, save_toy(base / "model", "llama-tied", head_dim=32, hidden_size=128), ptq={"rounds": 0})
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@contextmanager
def serving(folder: Path, log: Path, port: int, *more: str, **told: str) -> Iterator[Served]:
    """`lbllm serve` until the end of the block. more: options. told: environment variables."""
    command = [sys.executable, "-m", "lbllm_cli", "serve", "--model", str(folder), "--port", str(port), *more]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | told)
    end = time.monotonic() + SECONDS
    try:
        while "Application startup complete" not in log.read_text():
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.5)
        yield Served(process, folder, log, port)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()


@pytest.fixture(scope="module")
def server(served) -> Iterator[Served]:
    with serving(served, served.parent / "log", PORT, "--", "--enforce-eager") as found:
        yield found


def written(ok, server: Served, prompt: str, *more: str) -> str:
    command = ("generate", "--model", server.folder, "--prompt", prompt, "--max-new-tokens", "12", "--device", "cpu", *more)
    # vLLM holds back bytes that are no whole letter yet.
    return ok(*command).stdout.removesuffix("\n").rstrip("\ufffd")


def asked(server: Served, prompt: str, tokens: int = 12, **more: Any) -> Any:
    options = {"model": str(server.folder), "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    return server.client.completions.create(**options, **more)


def test_it_is_vllm_and_lists_the_model(server):
    assert [model.id for model in server.client.models.list()] == [str(server.folder)]
    assert f"serve: http://127.0.0.1:{PORT}/v1, model {server.folder}, vllm" in server.log.read_text()


def test_completions_are_what_generate_writes(server, ok):
    expected = written(ok, server, "The sea", "--raw")
    assert asked(server, "The sea").choices[0].text == expected
    pieces = [chunk.choices[0].text for chunk in asked(server, "The sea", stream=True)]
    assert "".join(pieces) == expected
    assert len(pieces) > 3


def test_chat_goes_through_the_template(server, ok):
    messages = [{"role": "user", "content": "hello"}]
    options = {"messages": messages, "model": str(server.folder), "max_tokens": 12, "temperature": 0}
    expected = written(ok, server, "hello")
    assert server.client.chat.completions.create(**options).choices[0].message.content == expected
    pieces = [chunk.choices[0].delta.content or "" for chunk in server.client.chat.completions.create(**options, stream=True)]
    assert "".join(pieces) == expected


def test_32_requests_of_mixed_lengths_at_once(server):
    words = ["the", "sea", "was", "calm", "and", "the", "boat", "went", "on", "along", "the", "shore", "till", "night"]
    asks = [(" ".join(words[: 1 + number % len(words)]), 1 + number % 23) for number in range(32)]
    with ThreadPoolExecutor(len(asks)) as pool:
        together = list(pool.map(lambda ask: asked(server, *ask, extra_body={"ignore_eos": True}), asks))
    assert [answer.usage.completion_tokens for answer in together] == [tokens for _, tokens in asks]
    alone = [asked(server, *ask, extra_body={"ignore_eos": True}).choices[0].text for ask in asks]
    assert [answer.choices[0].text for answer in together] == alone


def test_another_model_is_refused(server):
    with pytest.raises(openai.NotFoundError, match="gpt-2"):
        server.client.completions.create(model="gpt-2", prompt="x", max_tokens=1)


def test_the_command_vllm_serve_runs_where_vllm_has_its_name(served, ok, tmp_path):
    more = ("--full-activations", "--", "--enforce-eager", "--kv-cache-memory-bytes", str(1 << 24))
    with serving(served, tmp_path / "log", PORT + 1, *more, **named_vllm(tmp_path / "named")) as found:
        said = found.log.read_text()
        (line,) = [line for line in said.splitlines() if line.startswith("serve: http")]
        assert re.search(r"/export, vllm \d+\.\d+\.\d+", line)
        assert "vllm.entrypoints.cli.main" in " ".join(psutil.Process(found.process.pid).cmdline())
        expected = written(ok, found, "A comet is", "--raw", "--full-activations")
        assert expected != written(ok, found, "A comet is", "--raw")
        assert asked(found, "A comet is").choices[0].text == expected


def test_a_port_in_use_is_refused_before_the_model_is_read(server, lbllm):
    result = lbllm("serve", "--model", server.folder, "--port", str(PORT))
    assert result.exit_code == 2
    assert f"cannot listen on 127.0.0.1:{PORT} (" in result.stderr


def test_a_device_is_not_vllms_to_choose(server, lbllm):
    result = lbllm("serve", "--model", server.folder, "--engine", "vllm", "--device", "cpu")
    assert result.exit_code == 2
    assert "--device cpu: vLLM is built for one kind of device" in result.stderr


def test_experts_with_biases_go_to_transformers(lbllm, tmp_path):
    folder = exported(tmp_path, save_toy(tmp_path / "model", "gpt-oss", head_dim=32, hidden_size=128), ptq={"rounds": 0})
    result = lbllm("serve", "--model", folder, "--engine", "vllm")
    assert result.exit_code == 2
    assert "--engine vllm: it has no packed experts with biases; take --engine transformers" in result.stderr
