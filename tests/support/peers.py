"""Programs of llama.cpp that benchmarks/peers.sh builds."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from qvl.runtime.ggml.library import directory


def run_peer(name: str, *arguments: object) -> str:
    """Run a program on the libraries that are installed, and return its output; skip where it is missing."""
    root = Path(os.environ.get("PEERS_DIR", Path.home() / ".cache/qvl/peers"))
    found = sorted(root.glob(f"*/build/bin/{name}"))
    if not found:
        pytest.skip(f"no {name}: benchmarks/peers.sh builds it")
    environment = {**os.environ, "LD_LIBRARY_PATH": str(directory())}
    command = [str(found[-1]), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr
