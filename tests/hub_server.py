"""A hub on this machine: repositories made from what was recorded of the real ones, behind the same addresses."""

import gzip
import hashlib
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

import pyarrow
import pyarrow.parquet
import pytest
from conftest import ASSETS

RECORDED = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted((ASSETS / "hub").glob("*.json"))}
ROWS = 40
COMMIT = "0" * 39 + "1"
_TYPES: dict[str, Any] = {
    "string": pyarrow.string(), "float64": pyarrow.float64(), "int64": pyarrow.int64(),
    "messages": pyarrow.list_(pyarrow.struct({"content": pyarrow.string(), "role": pyarrow.string()})),
    "meta": pyarrow.struct({"redpajama_set_name": pyarrow.string()}),
}  # fmt: skip


def value_of(kind: str, file: str, row: int) -> Any:
    """What a column of a recorded type holds: text says its file and row."""
    said = f"{file} {row} " + f"word{row} " * 60
    if kind == "messages":
        return [{"content": said, "role": "user"}, {"content": "yes", "role": "assistant"}]
    return {"string": said, "float64": 0.5, "int64": row, "meta": {"redpajama_set_name": "RedPajamaC4"}}[kind]


def content(columns: dict[str, str], file: str) -> bytes:
    """A file with the recorded columns."""
    rows = [{name: value_of(kind, file, row) for name, kind in columns.items()} for row in range(ROWS)]
    if file.endswith(".json.gz"):
        return gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), mtime=0)
    packed = io.BytesIO()
    schema = pyarrow.schema({name: _TYPES[kind] for name, kind in columns.items()})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), packed, row_group_size=16)
    return packed.getvalue()


class Hub:
    """repositories: name -> revision -> file -> bytes. refusals: name -> the code that the hub answers with instead."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.refusals: dict[str, str] = {}

    def add(self, recorded: dict[str, Any]) -> dict[str, bytes]:
        """A repository as it was recorded; gives its files, to be changed."""
        files = {file: content(recorded["columns"], file) for file in recorded["files"]}
        self.repositories.setdefault(recorded["repository"], {})[recorded["revision"]] = files
        return files

    def answer(self, path: str, recursive: bool, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and content for an address of the hub's."""
        api = path.startswith("/api/datasets/")
        parts = [unquote(part) for part in path.removeprefix("/api").removeprefix("/datasets/").split("/")]
        repository, verb, revision, rest = "/".join(parts[:2]), *(parts[2:4] or ["", ""]), "/".join(parts[4:])
        if (code := self.refusals.get(repository)) and not (api and code == "GatedRepo"):
            # What a gated repository holds may be seen, and not read.
            return (401 if code == "GatedRepo" else 404), {"X-Error-Code": code, "X-Error-Message": "no"}, b""
        if repository not in self.repositories:
            # To whom is not logged in the hub does not say whether there is such a repository.
            return 401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b""
        revisions = self.repositories[repository]
        files = revisions.get(revision or "main", next(iter(revisions.values())) if revision == COMMIT else None)
        if files is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if not api:
            return (200, {}, files[rest]) if rest in files else (404, {"X-Error-Code": "EntryNotFound"}, b"")
        if verb == "tree":
            found: Any = _children(files, f"{rest}/" if rest else "", recursive)
        elif verb == "paths-info":
            wanted = json.loads(body)["paths"]
            found = [_entry(files, name) for name in wanted if name in files]
            found += [_entry(files, name) for name in wanted if any(file.startswith(f"{name}/") for file in files)]
        else:
            found = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
        return 200, {"Content-Type": "application/json"}, json.dumps(found).encode()


def _children(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict[str, Any]]:
    below = [name.removeprefix(folder) for name in files if name.startswith(folder)]
    parts = {"/".join(name.split("/")[:depth]) for name in below for depth in range(1, 2 + recursive * name.count("/"))}
    return [_entry(files, folder + part) for part in sorted(parts)]


def _entry(files: dict[str, bytes], name: str) -> dict[str, Any]:
    if name not in files:
        return {"type": "directory", "path": name, "oid": "0"}
    return {"type": "file", "path": name, "size": len(files[name]), "oid": hashlib.sha1(files[name]).hexdigest()}


@contextmanager
def serving(patch: pytest.MonkeyPatch, folder: Any) -> Iterator[Hub]:
    """A hub that the libraries take for theirs. folder: for their caches."""
    import datasets
    import huggingface_hub
    from huggingface_hub import constants

    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            address = urlparse(self.path)
            recursive = parse_qs(address.query).get("recursive", ["false"])[0].lower() in {"true", "1"}
            status, headers, found = hub.answer(address.path, recursive, body)
            headers = {**headers, "ETag": f'"{hashlib.sha1(found).hexdigest()}"', "X-Repo-Commit": COMMIT}
            if status == 200 and (span := self.headers.get("Range")):
                first, _, last = span.removeprefix("bytes=").partition("-")
                stop = min(int(last) + 1 if last else len(found), len(found))
                headers["Content-Range"] = f"bytes {first}-{stop - 1}/{len(found)}"
                status, found = 206, found[int(first) : stop]
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(found))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(found)

        do_GET = do_HEAD = do_POST = reply

        def log_message(self, *_: Any) -> None:
            """Nothing is printed."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    for module, name, value in [
        (constants, "HF_HUB_OFFLINE", False), (datasets.config, "HF_HUB_OFFLINE", False),
        (constants, "ENDPOINT", endpoint), (datasets.config, "HF_ENDPOINT", endpoint),
        (constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"),
        (datasets.config, "HF_DATASETS_CACHE", str(folder)), (datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False),
    ]:  # fmt: skip
        patch.setattr(module, name, value)
    patch.setenv("NO_PROXY", "*")
    huggingface_hub.HfFileSystem.clear_instance_cache()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        huggingface_hub.HfFileSystem.clear_instance_cache()
