"""Commands that write are killed at random instants, and meet full disks and folders that cannot be written.

Nothing finished is lost, nothing half-made is taken for whole. (Captions: tests/caption/test_kill.py.)
QVL_KILLS says how often each is killed; `make kills` has 50.
"""

from __future__ import annotations

import base64
import errno
import io
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.checkpoint import Shape, Style, write_checkpoint
from support.families import write_family

from qvl.cli.chat import sessions
from qvl.convert import Converted, convert
from qvl.runtime.caption.inputs import Item
from qvl.runtime.caption.ledger import Ledger
from qvl.runtime.caption.record import Record
from qvl.runtime.caption.sidecar import Sidecars
from qvl.runtime.errors import OutputError
from qvl.runtime.ggml.imatrix import Entry, Imatrix, read_imatrix, write_imatrix
from qvl.runtime.vision.cache import EmbeddingCache

N_KILLS = int(os.environ.get("QVL_KILLS", "4"))

SAVING = """
import sys
from qvl.cli.chat.sessions import Saved, save
for n in range(1, 400):
    save(sys.argv[1], Saved([{"role": "user", "content": "x" * 2000}] * n))
    print(n, flush=True)
"""
CACHING = """
import sys, types
import numpy as np
from pathlib import Path
from qvl.runtime.vision.cache import EmbeddingCache
cache = EmbeddingCache(Path(sys.argv[1]))
for n in range(400):
    made = types.SimpleNamespace(embeddings=np.full((64, 64), n, np.float32), grid_thw=(1, 16, 16))
    cache.put(f"{n:064x}", made)
    print(n, flush=True)
"""


def qvl(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "qvl.cli", *map(str, arguments)]


def killed(command: list[str], after: float) -> str:
    """Run a command and kill it so many seconds after its start; what it printed."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(after)
        process.send_signal(signal.SIGKILL)
        printed, said = process.communicate()
    assert process.returncode in (-signal.SIGKILL, 0), said
    return printed


def timed(command: list[str]) -> float:
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return time.monotonic() - started


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen_vl", "qwen2_5_vl", "qwen3_vl_moe"])
def test_conversion(tmp_path: Path, family: str) -> None:
    chance = random.Random(f"convert {family}")
    if family == "qwen2_vl":
        shape = Shape(hidden=256, inner=1024, layers=4, depth=2, vocab_size=288)
        checkpoint = write_checkpoint(tmp_path / "c", shape, Style(tokenizer="bytes", dtype="BF16"))
    else:
        checkpoint = write_family(tmp_path / "c", family)
    out = tmp_path / "out"
    command = qvl("convert", checkpoint, "-o", out, "--type", "q4_k_m", "--force", "-q")
    seconds = timed(command)
    new = {path.name: path.read_bytes() for path in out.iterdir()}
    for _ in range(N_KILLS if family == "qwen2_vl" else N_KILLS // 2):
        for name in new:
            (out / name).write_bytes(b"old")
        killed(command, chance.uniform(0.3 * seconds, 1.1 * seconds))
        found = {name: (out / name).read_bytes() for name in new if (out / name).exists()}
        assert found in (dict.fromkeys(new, b"old"), new) or len(found) < 2  # a pair is never mixed
        for name, data in found.items():
            assert data in (b"old", new[name])
    timed(command)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.suffix == ".gguf"} == new
    assert not [name for name in listing(out) if name.endswith(".part")]


def test_calibration(tiny_model: Converted, tmp_path: Path) -> None:
    chance = random.Random("imatrix")
    (tmp_path / "t.txt").write_text("Hello there, all of you. " * 500)

    def command(out: Path) -> list[str]:
        return qvl("imatrix", "-m", tiny_model.text.parent, "--text", tmp_path / "t.txt", "-o", out, "-q")

    calm, out = tmp_path / "calm.gguf", tmp_path / "out.gguf"
    seconds = timed(command(calm))
    done = 0
    for _ in range(N_KILLS):
        killed(command(out), chance.uniform(0.3 * seconds, seconds))
        if out.exists():
            found = read_imatrix(out)
            assert found.chunks >= done
            done = found.chunks
            if done == read_imatrix(calm).chunks:
                out.unlink()
                done = 0
    if not out.exists() or done < read_imatrix(calm).chunks:
        timed(command(out))
    expected, found = read_imatrix(calm), read_imatrix(out)
    assert found.chunks == expected.chunks
    for name, entry in expected.entries.items():
        np.testing.assert_allclose(found.entries[name].sums, entry.sums, rtol=1e-5)


def test_sessions(tmp_path: Path) -> None:
    chance = random.Random("sessions")
    path = tmp_path / "s.json"
    for _ in range(N_KILLS):
        path.unlink(missing_ok=True)
        printed = killed([sys.executable, "-c", SAVING, str(path)], chance.uniform(0.2, 0.9)).split()
        if printed:
            assert len(sessions.load(str(path)).messages) >= int(printed[-1])


def test_the_cache(tmp_path: Path) -> None:
    chance = random.Random("cache")
    for _ in range(N_KILLS):
        printed = killed([sys.executable, "-c", CACHING, str(tmp_path)], chance.uniform(0.2, 0.9)).split()
        cache = EmbeddingCache(tmp_path)
        found = {n: cache.get(f"{n:064x}") for n in range(400)}
        for n, entry in found.items():
            assert entry is None or (entry.embeddings == n).all()
        assert all(found[int(n)] is not None for n in printed)  # a kill is no power cut


def test_a_server(tmp_path: Path) -> None:
    """Killed while it encodes, streams and stores: the cache holds whole embeddings alone."""
    httpx = pytest.importorskip("httpx2")
    chance = random.Random("serve")
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    command = qvl("serve", "--port", "0", "-c", "512")
    folder = tmp_path / "qvl" / "embeddings"
    stored = 0
    for n in range(N_KILLS):
        body = {"stream": True, "max_tokens": 200, "messages": [{"role": "user", "content": [noise(n)]}]}
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            killer = threading.Timer(chance.uniform(0, 0.4), process.kill)
            try:
                while httpx.get(f"{address}health", timeout=60).status_code != 200:
                    time.sleep(0.02)
                killer.start()
                with httpx.stream("POST", f"{address}v1/chat/completions", json=body, timeout=60) as response:
                    for _ in response.iter_lines():
                        pass
            except httpx.HTTPError:
                pass
            finally:
                process.kill()
                killer.cancel()
        cache = EmbeddingCache(folder)
        keys = [path.stem for path in folder.glob("*.safetensors")]
        assert all(cache.get(key) is not None for key in keys)
        assert len(keys) >= stored
        stored = len(keys)


def noise(seed: int) -> dict[str, object]:
    """A part of a message: a picture that no cache knows."""
    pixels = np.random.default_rng(seed).integers(0, 256, (112, 112, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


# full disks and folders that cannot be written -----------------------------------------------------------


class Made:
    embeddings = np.ones((64, 64), np.float32)
    grid_thw = (1, 16, 16)


def write_captions(folder: Path) -> None:
    with Ledger(folder / "out.jsonl", {}) as ledger:
        ledger.append([Record("a.png", "x" * 5000)])


WRITERS: dict[str, Callable[[Path], object]] = {
    "imatrix": lambda f: write_imatrix(f / "i.gguf", Imatrix({"a.weight": Entry(np.ones(4096), 1)})),
    "session": lambda f: sessions.save(
        str(f / "s.json"), sessions.Saved([{"role": "user", "content": "x" * 5000}])
    ),
    "sidecar": lambda f: Sidecars().write(Item(str(f / "a.png")), Record("a.png", "x" * 5000)),
    "captions": write_captions,
}


def refuse_new_files(monkeypatch: pytest.MonkeyPatch, folder: Path, code: int) -> None:
    """Act like a read-only folder or a full disk, also for root, whom permissions do not bind."""
    real = os.open

    def refuse(path: str, flags: int, *rest: int, **more: int) -> int:
        if flags & os.O_CREAT and str(folder) in os.fspath(path):
            raise OSError(code, os.strerror(code), os.fspath(path))
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_conversion_into_a_read_only_folder(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    refuse_new_files(monkeypatch, tmp_path, code)
    with pytest.raises(OutputError, match="cannot be written") as caught:
        convert(tiny_checkpoint, tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert listing(tmp_path) == []


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_cache_in_a_read_only_folder_is_slow_and_not_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    cache = EmbeddingCache(tmp_path, memory_bytes=0)
    refuse_new_files(monkeypatch, tmp_path, code)
    cache.put("ab" * 32, Made())
    assert cache.get("ab" * 32) is None
    assert listing(tmp_path) == []


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_folder_in_which_nothing_can_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    refuse_new_files(monkeypatch, tmp_path, code)
    said = "the disk is full" if code == errno.ENOSPC else "cannot be written"
    with pytest.raises(OutputError, match=said) as caught:
        WRITERS[name](tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert listing(tmp_path) == []


@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_fills_up(tmp_path: Path, name: str) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        with pytest.raises(OutputError, match="the disk is full"):
            WRITERS[name](tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    left = listing(tmp_path)
    assert not [n for n in left if n.endswith((".part", ".lock"))]
    assert all((tmp_path / n).stat().st_size < 1000 for n in left)  # the ledger's own files, without a record


def test_a_cache_on_a_full_disk_is_slow_and_not_wrong(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    cache = EmbeddingCache(tmp_path, memory_bytes=0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        cache.put("ab" * 32, Made())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert cache.get("ab" * 32) is None
    assert listing(tmp_path) == []


def test_conversion_on_a_full_disk(tiny_checkpoint: Path, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OutputError, match="the disk is full"):
            convert(tiny_checkpoint, tmp_path, "f32", "f32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert listing(tmp_path) == []
