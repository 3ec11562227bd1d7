"""Checkpoints by repository id, against a stand-in for the hub on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from support.checkpoint import Shape, Style, write_checkpoint

from qvl.convert.hub import find_source
from qvl.runtime.errors import CheckpointError

REPO = "someone/Tiny-VL"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the stand-in serves, and what it was asked for.

    Attributes:
        cut: serve only so many bytes of a weight file, then drop the connection.
    """

    folder: Path
    endpoint: str = ""
    asked: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    cut: int | None = None


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = write_checkpoint(tmp_path / "served", Shape(), Style(dtype="BF16", shards=2))
    (folder / "flax_model.msgpack").write_bytes(b"x" * 100)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    hub = Hub(folder)

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            hub.asked.append(self.path)
            hub.tokens.add(self.headers.get("Authorization"))
            path = self.path.split("?")[0]
            if path.startswith(f"/api/models/{REPO}/tree/"):
                files = [
                    {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "0" * 40}
                    for p in sorted(folder.iterdir())
                ]
                self.send(json.dumps(files).encode(), {"Content-Type": "application/json"}, body)
            elif path.startswith(f"/api/models/{REPO}/"):
                names = sorted(p.name for p in folder.iterdir())
                info: dict[str, Any] = {
                    "id": REPO,
                    "sha": COMMIT,
                    "siblings": [{"rfilename": n} for n in names],
                }
                self.send(json.dumps(info).encode(), {"Content-Type": "application/json"}, body)
            elif path.startswith(f"/{REPO}/resolve/") and (folder / path.rpartition("/")[2]).is_file():
                content = (folder / path.rpartition("/")[2]).read_bytes()
                tag = hashlib.sha256(content).hexdigest()
                self.send(content, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT}, body)
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

        def send(self, content: bytes, headers: dict[str, str], body: bool) -> None:
            self.send_response(200)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content if hub.cut is None else content[: hub.cut])

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    yield hub
    server.shutdown()


def run(hub: Hub, home: Path, out: Path, repo: str = REPO, **environment: str) -> dict[str, Any]:
    """Convert in a process of its own, since huggingface_hub reads its environment once."""
    code = """
import json, sys
from qvl.convert import convert
from qvl.runtime.errors import QvlError
try:
    done = convert(sys.argv[1], sys.argv[2], "q8_0", "q8_0", force=True)
    print(json.dumps({"text": str(done.text), "mmproj": str(done.mmproj)}))
except QvlError as error:
    print(json.dumps({"error": type(error).__name__, "message": str(error), "hint": error.hint}))
"""
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_HOME": str(home), "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    command = [sys.executable, "-c", code, repo, str(out)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no bars where stderr is no terminal
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_a_repository_is_downloaded_once_and_then_works_offline(hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    first = run(hub, home, tmp_path / "out", HF_TOKEN="hf_secret")
    assert Path(first["text"]).name == "Tiny-VL-Q8_0.gguf"
    assert Path(first["mmproj"]).is_file()
    assert b"https://huggingface.co/someone/Tiny-VL" in Path(first["text"]).read_bytes()
    assert b"apache-2.0" in Path(first["text"]).read_bytes()
    assert "Bearer hf_secret" in hub.tokens
    assert any("model-00002-of-00002.safetensors" in path for path in hub.asked)
    assert not any("flax_model" in path for path in hub.asked)
    assert (home / "hub" / "models--someone--Tiny-VL").is_dir()

    hub.asked.clear()
    again = run(hub, home, tmp_path / "again", HF_HUB_OFFLINE="1")
    assert not hub.asked
    assert Path(again["text"]).read_bytes() == Path(first["text"]).read_bytes()


def test_offline_without_a_copy_says_so(hub: Hub, tmp_path: Path) -> None:
    failed = run(hub, tmp_path / "home", tmp_path / "out", HF_HUB_OFFLINE="1")
    assert failed["error"] == "DownloadError"
    assert "HF_HUB_OFFLINE is set" in failed["message"]
    assert not hub.asked
    assert not (tmp_path / "out").exists()


def test_an_unknown_repository_says_so(hub: Hub, tmp_path: Path) -> None:
    failed = run(hub, tmp_path / "home", tmp_path / "out", repo="someone/Nothing")
    assert failed["error"] == "DownloadError"
    assert "no such repository" in failed["message"]
    assert "HF_TOKEN" in failed["hint"]


def test_a_hub_that_cannot_be_reached_says_so(hub: Hub, tmp_path: Path) -> None:
    failed = run(hub, tmp_path / "home", tmp_path / "out", HF_ENDPOINT="http://127.0.0.1:9")
    assert failed["error"] == "DownloadError"
    assert "cannot be reached" in failed["message"]


def test_a_download_cut_short_is_an_error(hub: Hub, tmp_path: Path) -> None:
    hub.cut = 100
    failed = run(hub, tmp_path / "home", tmp_path / "out", HF_HUB_DOWNLOAD_TIMEOUT="2")
    assert failed["error"] == "DownloadError"
    hub.cut = None
    assert "text" in run(hub, tmp_path / "home", tmp_path / "out")


def test_names_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "My-Model"
    folder.mkdir()
    assert find_source(folder).name == "My-Model"
    monkeypatch.chdir(folder)
    assert find_source(".").name == "My-Model"
    assert find_source("../My-Model").folder.samefile(folder)


@pytest.mark.parametrize("src", ["no/such/folder", "nothing", "/a/b", "a//b", "../x/y", "https://hf.co/a/b"])
def test_what_is_neither_is_refused(src: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder") as caught:
        find_source(src)
    assert "hub id" in str(caught.value.hint)


def test_a_file_or_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="a file, expected a checkpoint's folder"):
        find_source(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match="no checkpoint given"):
        find_source("")
