"""`qvl serve` as a process: what it prints, and how it ends."""

from __future__ import annotations

import base64
import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2 as httpx
import numpy as np
import pytest
from PIL import Image

PATIENCE = 60.0  # seconds, on a machine that is busy with other tests


@contextmanager
def start(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "qvl.cli", "serve", "--port", "0", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def ready(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    assert address.startswith("http://127.0.0.1:") and address.endswith("/")
    deadline = time.monotonic() + PATIENCE
    while (status := httpx.get(f"{address}health", timeout=PATIENCE).status_code) != 200:
        assert status == 503 and time.monotonic() < deadline
        time.sleep(0.05)
    return address


def test_sigterm_finishes_what_is_under_way_and_exits_with_0() -> None:
    with start("-c", "512") as process:
        address = ready(process)
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 40, "stream": True}
        with httpx.stream("POST", f"{address}v1/chat/completions", json=body, timeout=PATIENCE) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert process.wait(PATIENCE) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--host", "0.0.0.0"), "can be reached from other machines"),
        (("--media-path", "/nowhere"), "no such folder"),
        (("-m", "/nowhere.gguf"), "no such file"),
        (("--cors", "*"), "every origin"),
    ],
)
def test_what_cannot_be_served_is_said(arguments: tuple[str, ...], said: str) -> None:
    with start(*arguments) as process:
        _, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 1 and said in err and "Traceback" not in err


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_memory_stays_flat() -> None:
    """Pictures of 200 kB, whose patches take 700 kB: none of sixty requests leaves either behind."""
    random = np.random.default_rng(0)
    with start("-c", "1024", "--parallel", "2") as process, httpx.Client(timeout=PATIENCE) as http:
        address = ready(process)

        def resident() -> float:
            statm = Path(f"/proc/{process.pid}/statm").read_text()
            return int(statm.split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

        def ask(n: int) -> None:
            for _ in range(n):
                noise = random.integers(0, 256, (random.integers(200, 312), 256, 3), np.uint8)
                data = io.BytesIO()
                Image.fromarray(noise).save(data, "PNG", compress_level=1)
                url = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
                content = [{"type": "image_url", "image_url": {"url": url}}]
                body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
                assert http.post(f"{address}v1/chat/completions", json=body).status_code == 200

        ask(20)
        before = resident()
        ask(60)
        assert resident() - before < 9


def test_a_port_that_is_taken_is_said() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with start("--port", str(taken.getsockname()[1])) as process:
            out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1 and not out
    assert "in use" in err and "--port" in err and "Traceback" not in err
