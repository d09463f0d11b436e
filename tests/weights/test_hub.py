"""Hugging Face ids, against a hub of our own on this machine that answers as the real one does."""

from __future__ import annotations

import hashlib
import http.server
import json
import shutil
import threading
import time
from pathlib import Path
from urllib.parse import unquote

import huggingface_hub
import pytest
from huggingface_hub import constants

from llminfer.errors import UserError
from llminfer.weights import hub, open_model

SHA = "0123456789abcdef0123456789abcdef01234567"
EXTRA = ("README.md", "model.py", "pytorch_model.bin", "onnx/model.safetensors", "consolidated.safetensors", "original/params.json")


class Hub(http.server.BaseHTTPRequestHandler):
    """The few routes of the hub that downloading a model uses. repos: id -> {file: bytes}; asked: paths of all requests."""

    repos: dict[str, dict[str, bytes]]
    asked: list[str]

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.asked.append(path)
        api = path.startswith("/api/models/")
        org, name, *rest = path.removeprefix("/api/models").strip("/").split("/")
        repo = f"{org}/{name}"
        files = self.repos.get(repo)
        # "revision/<rev>", "tree/<rev>", "resolve/<rev>/<file>", or nothing.
        revision = rest[1] if len(rest) > 1 else "main"
        if files is None:
            return self._answer(404, error="RepoNotFound")
        if revision not in ("main", "v1", SHA):
            return self._answer(404, error="RevisionNotFound")
        if api and rest[:1] in ([], ["revision"]):
            siblings = [{"rfilename": name, "size": len(data), "blobId": "0" * 40} for name, data in files.items()]
            return self._answer(200, json.dumps({"id": repo, "sha": SHA, "siblings": siblings, "private": False}).encode())
        if api:
            tree = [{"type": "file", "path": name, "size": len(data), "oid": _etag(data)} for name, data in files.items()]
            return self._answer(200, json.dumps(tree).encode())
        if org == "gated":
            return self._answer(403, error="GatedRepo")
        data = files.get("/".join(rest[2:]))
        return self._answer(404, error="EntryNotFound") if data is None else self._answer(200, data)

    def _answer(self, code: int, data: bytes = b"", error: str = "") -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Repo-Commit", SHA)
        self.send_header("ETag", f'"{_etag(data)}"')
        if error:
            self.send_header("X-Error-Code", error)
            self.send_header("X-Error-Message", error)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def served(tmp_path, tiny_directory, monkeypatch):
    """The class of a hub that serves the tiny model as org/tiny, and the cache that downloads go to."""
    files = {p.name: p.read_bytes() for p in tiny_directory.iterdir()}
    repos = {
        "org/tiny": files | dict.fromkeys(EXTRA, b"not to be downloaded"),
        "gated/tiny": files,
        "org/ggufs": {"README.md": b"", "a.Q4_0.gguf": b"GGUF", "b.gguf": b"GGUF"},
        "org/old": {"config.json": files["config.json"], "pytorch_model.bin": b"x"},
        "org/strange": files | {"config.json": b'{"architectures": ["WhaleForCausalLM"], "model_type": "whale"}'},
    }
    handler = type("Served", (Hub,), {"repos": repos, "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        _point(monkeypatch, f"http://127.0.0.1:{server.server_port}", tmp_path / "cache")
        yield handler, tmp_path / "cache"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _point(monkeypatch: pytest.MonkeyPatch, address: str, cache: Path) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


class Bytes:
    """Progress that counts."""

    def __init__(self) -> None:
        self.count = self.total = 0.0

    def task(self, description: str, total: float | None) -> Bytes:
        self.total = total or 0.0
        return self

    def advance(self, n: float) -> None:
        self.count += n

    def done(self) -> None:
        assert self.count <= self.total


def no_check(folder: Path) -> None:
    assert (folder / "config.json").is_file()


def test_only_the_files_of_a_model_come_from_one_commit(served, tiny_directory) -> None:
    handler, _ = served
    progress = Bytes()
    folder, source = hub.fetch("org/tiny", no_check, progress)
    assert source == f"org/tiny@{SHA}"
    assert {str(p.relative_to(folder)) for p in folder.rglob("*")} == {p.name for p in tiny_directory.iterdir()}
    assert progress.total == progress.count + len(handler.repos["org/tiny"]["config.json"])  # which is there before
    assert all(f"/resolve/{SHA}/" in path for path in handler.asked if "/resolve/" in path)
    found = open_model("org/tiny@v1")
    assert (found.source, found.config.name) == (f"org/tiny@{SHA}", "tiny") and found.tokenizer() is not None
    assert next(iter(found.leaves()))[0] == "embed"


def test_the_cache_serves_without_a_network(served, monkeypatch) -> None:
    handler, cache = served
    hub.fetch("org/tiny", no_check)
    _point(monkeypatch, "http://127.0.0.1:9", cache)  # where nobody listens
    handler.asked.clear()
    for name in ("org/tiny", f"org/tiny@{SHA}"):
        folder, source = hub.fetch(name, no_check)
        assert source == f"org/tiny@{SHA}" and (folder / "model.safetensors").is_file()
    shutil.rmtree(cache)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"^model='org/tiny': there is no such path, .* the hub cannot be reached") as caught:
        hub.fetch("org/tiny", no_check)
    assert time.monotonic() - started < 5 and "\n" not in str(caught.value) and not handler.asked


def test_what_the_config_refuses_is_not_downloaded(served) -> None:
    handler, _ = served
    with pytest.raises(UserError, match="WhaleForCausalLM"):
        open_model("org/strange")
    assert not any(path.endswith(".safetensors") for path in handler.asked)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("org/none", "no such repository"),
        ("org/tiny@v7", "the repository has no revision v7"),
        ("gated/tiny", "its license must be accepted first, at huggingface.co/gated/tiny"),
        ("org/ggufs", "GGUF files and no safetensors; download one and give its path: a.Q4_0.gguf, b.gguf"),
        ("org/old", "no config.json with safetensors; there is: config.json, pytorch_model.bin"),
        ("org/a..b--c", "it is no id of the Hugging Face hub"),
    ],
)
def test_refusals_are_one_line(served, model, said) -> None:
    _, cache = served
    with pytest.raises(UserError) as caught:
        open_model(model)
    assert said in str(caught.value) and str(caught.value).startswith(f"model='{model}': ") and "\n" not in str(caught.value)
    assert not list(cache.rglob("*.safetensors"))


def test_a_full_disk_is_told(served, monkeypatch) -> None:
    def full(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(UserError, match=r"cannot be stored in the cache of the Hugging Face hub \(No space left on device\)"):
        hub.fetch("org/tiny", no_check)


def test_paths_are_no_ids() -> None:
    ids = ["org/name", "org/name@main", "Org-1/n.4_M@refs/pr/3"]
    assert all(map(hub.is_id, ids))
    assert not any(map(hub.is_id, ["name", "/org/name", "./name", "../name", "a/b/c", "org/name@", "org/na me", "org/name\n"]))
