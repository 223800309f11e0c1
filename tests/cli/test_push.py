"""`lbllm export --push` against a hub on this machine, through huggingface_hub itself."""

import base64
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from conftest import write_recipe
from huggingface_hub import constants

TOKEN = "hf_thisIsOnlyATest"
NAME = "people/Toy-W2"


class FakeHub:
    """files: of the one repository, as commits leave them. Weights come by the addresses of LFS, all else in the commit."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}
        self.created: list[dict[str, Any]] = []
        self.messages: list[str] = []
        self.refused = False
        # What it answers to weights, and to who asks.
        self.stores, self.knows = 200, 200
        # Set: an upload has begun, and waits.
        self.begun, self.goes_on = threading.Event(), threading.Event()
        self.goes_on.set()
        self.endpoint = ""

    def answer(self, method: str, path: str, body: bytes, token: str | None) -> tuple[int, Any]:
        if method == "PUT":
            self.objects[path.rpartition("/")[2]] = body
            return self.stores, {}
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        if path == "/api/whoami-v2":
            return self.knows, {"type": "user", "name": "people"}
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            return 200, {"url": f"{self.endpoint}/{NAME}"}
        if path.endswith("/preupload/main"):
            self.begun.set()
            self.goes_on.wait(60)
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            return 200, {"files": [{"path": name, "uploadMode": modes[name], "shouldIgnore": False} for name in names]}
        if path.endswith("/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            put = lambda oid: {"upload": {"href": f"{self.endpoint}/store/{oid}"}}  # noqa: E731
            return 200, {"transfer": "basic", "objects": [{**one, "actions": put(one["oid"])} for one in wanted]}
        if path.endswith("/commit/main") and self.refused:
            return 403, {"error": "no rights"}
        if path.endswith("/commit/main"):
            return 200, self.commit([json.loads(line) for line in body.splitlines()])
        if "/tree/" in path:
            return 200, [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in self.files]
        return 200, {"id": NAME, "sha": "1" * 40, "siblings": [{"rfilename": name} for name in self.files]}

    def commit(self, lines: list[dict[str, Any]]) -> dict[str, str]:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.messages.append(value["summary"])
            elif line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del self.files[value["path"]]
        return {"commitUrl": f"{self.endpoint}/{NAME}/commit/1", "commitOid": "1" * 40}


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[FakeHub]:
    found = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            body, path = self.rfile.read(size), self.path.partition("?")[0]
            status, answer = found.answer(self.command, path, body, self.headers["Authorization"])
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            with suppress(BrokenPipeError):  # of a client that was ended
                self.wfile.write(content)

        do_GET = do_POST = do_PUT = reply

        def log_message(self, *_: Any) -> None:
            """Nothing is printed."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    found.endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", found.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield found
    found.goes_on.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def recipe(ok, toy, tmp_path):
    path = write_recipe(tmp_path / "r.yaml", toy, tmp_path / "run", ptq={"rounds": 0})
    ok("ptq", "--recipe", path)
    return path


def test_the_folder_is_what_lies_on_the_hub(ok, recipe, hub, tmp_path):
    earlier = ("model-00001-of-00002.safetensors", "model.gguf", "chat_template.jinja", "vocab.txt")
    hub.files = {**dict.fromkeys(earlier, b"of an earlier export"), ".gitattributes": b"theirs"}
    result = ok("export", "--recipe", recipe, "--push", NAME, "--private")
    export = tmp_path / "run" / "export"
    assert f"export: {hub.endpoint}/{NAME}" in result.stderr
    (created,) = hub.created
    assert created["name"] == "Toy-W2"
    assert created["organization"] == "people"
    assert created.get("visibility") == "private" or created.get("private") is True
    assert hub.files.pop(".gitattributes") == b"theirs"
    assert {name: hashlib.sha256(data).hexdigest() for name, data in hub.files.items()} == {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in export.iterdir()
    }
    assert hub.messages == ["lbllm 0.1.0, ptq, packed"]
    card = (export / "README.md").read_text()
    assert f'from_pretrained("{NAME}")' in card
    assert f"vllm serve {NAME}" in card


def test_no_file_has_the_token(ok, recipe, hub, tmp_path):
    ok("export", "--recipe", recipe, "--push", NAME)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) > 10
    assert not [file for file in files if TOKEN.encode() in file.read_bytes()]
    assert not [name for name, data in hub.files.items() if TOKEN.encode() in data]


def test_an_export_that_is_there_is_uploaded_without_being_written(ok, recipe, hub):
    ok("export", "--recipe", recipe)
    result = ok("export", "--recipe", recipe, "--push", NAME)
    assert "export: up to date" in result.stderr
    assert hub.files["model.safetensors"]
    assert hub.created[0].get("visibility") != "private"
    assert not hub.created[0].get("private")


def test_a_dry_run_uploads_nothing(ok, recipe, hub):
    result = ok("export", "--recipe", recipe, "--push", NAME, "--dry-run")
    assert f"and upload it to {NAME}" in result.stderr
    assert not hub.created


def test_a_refusal_leaves_the_export(lbllm, recipe, hub, tmp_path):
    hub.refused = True
    result = lbllm("export", "--recipe", recipe, "--push", NAME)
    assert result.exit_code == 1
    assert f"--push {NAME}: " in result.stderr
    assert "403" in result.stderr
    assert f"{tmp_path / 'run' / 'export'} is written; run the same command again" in result.stderr
    assert "Traceback" not in result.stderr
    assert (tmp_path / "run" / "export" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--push", "Toy"], "--push Toy: expected ORG/NAME"),
        (["--push", "a/b/c"], "--push a/b/c: expected ORG/NAME ("),
        (["--private"], "give --push ORG/NAME too"),
    ],
)
def test_wrong_names_are_refused_before_anything_is_written(lbllm, recipe, hub, tmp_path, arguments, message):
    result = lbllm("export", "--recipe", recipe, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "run" / "export").exists()


def test_without_a_token_nothing_is_written(lbllm, recipe, hub, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    result = lbllm("export", "--recipe", recipe, "--push", NAME)
    assert result.exit_code == 2
    assert f"--push {NAME}: the Hub needs a token; run: hf auth login, or set HF_TOKEN" in result.stderr
    assert not (tmp_path / "run" / "export").exists()


def test_a_token_that_the_hub_does_not_take_is_said(lbllm, recipe, hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_ofSomebodyElse")
    result = lbllm("export", "--recipe", recipe, "--push", NAME)
    assert result.exit_code == 2
    assert f"--push {NAME}: the Hub does not take this token" in result.stderr
    assert "hf_ofSomebodyElse" not in result.stderr
    assert not (tmp_path / "run" / "export").exists()


def closed() -> str:
    """An address at which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_a_hub_that_is_not_there_is_no_fault_of_the_token(lbllm, recipe, hub, tmp_path, monkeypatch):
    address = closed()
    monkeypatch.setattr(constants, "ENDPOINT", address)
    result = lbllm("export", "--recipe", recipe, "--push", NAME)
    assert result.exit_code == 2
    assert f"--push {NAME}: expected an answer of {address}, got: " in result.stderr
    assert "refused; check the network, HF_ENDPOINT and HF_HUB_OFFLINE" in result.stderr
    assert "token" not in result.stderr
    assert not (tmp_path / "run" / "export").exists()


def test_a_hub_in_trouble_is_no_fault_of_the_token(lbllm, recipe, hub):
    hub.knows = 503
    result = lbllm("export", "--recipe", recipe, "--push", NAME)
    assert result.exit_code == 2
    assert f"--push {NAME}: expected an answer of {hub.endpoint}, got: " in result.stderr
    assert "503" in result.stderr
    assert "token" not in result.stderr


def test_offline_mode_is_named(lbllm, recipe, hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    result = lbllm("export", "--recipe", recipe, "--push", NAME)
    assert result.exit_code == 2
    assert "offline mode is enabled" in result.stderr
    assert "token" not in result.stderr


def test_weights_that_do_not_arrive_leave_the_export(lbllm, recipe, hub, tmp_path):
    hub.stores = 403
    result = lbllm("export", "--recipe", recipe, "--push", NAME)
    assert result.exit_code == 1
    assert "Error while uploading 'model.safetensors' to the Hub." in result.stderr
    assert "to the Hub. 403 Forbidden" in result.stderr
    assert f"{tmp_path / 'run' / 'export'} is written; run the same command again" in result.stderr
    assert not hub.messages


@pytest.mark.heavy
def test_a_signal_ends_an_upload_at_once(recipe, hub, tmp_path):
    hub.goes_on.clear()
    told = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "lbllm_cli", "export", "--recipe", str(recipe), "--push", NAME]
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env={**os.environ, **told}, preexec_fn=heard, **pipes) as child:
        assert hub.begun.wait(120)
        assert int((tmp_path / "run" / ".lock").read_text()) == child.pid
        child.send_signal(signal.SIGINT)
        _, stderr = child.communicate(timeout=20)
    assert child.returncode == 130
    assert stderr.endswith("lbllm: interrupted; run the same command again to resume\n")
    assert (tmp_path / "run" / "export" / "model.safetensors").exists()
    assert not hub.messages
