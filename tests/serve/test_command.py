"""`qvl serve` as a process: what it prints, and how it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import httpx2 as httpx
import pytest


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "qvl.cli", "serve", "--port", "0", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ready(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    assert address.startswith("http://127.0.0.1:") and address.endswith("/")
    deadline = time.monotonic() + 60
    while (status := httpx.get(f"{address}health").status_code) != 200:
        assert status == 503 and time.monotonic() < deadline
        time.sleep(0.05)
    return address


def test_sigterm_finishes_what_is_under_way_and_exits_with_0() -> None:
    with start("-c", "512") as process:
        address = ready(process)
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 40, "stream": True}
        with httpx.stream("POST", f"{address}v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert process.wait(15) == 0


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
        _, err = process.communicate(timeout=30)
        assert process.returncode == 1 and said in err and "Traceback" not in err
