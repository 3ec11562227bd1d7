"""Fixtures that every test may use: a random tiny checkpoint, and the pair converted from it."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings
from support.checkpoint import Shape, Style, write_checkpoint
from support.ports import free_port, wait_for_port

from qvl.convert import Converted, convert
from qvl.runtime.ggml import library as ggml

NANO = Path(__file__).resolve().parents[1] / "models" / "nano"

# A shell starts what it puts into the background with Ctrl-C ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("qvl", deadline=None)  # a busy machine is no failure
settings.load_profile("qvl")


@pytest.fixture(scope="session")
def tiny_shape() -> Shape:
    return Shape()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_shape: Shape) -> Path:
    """A random checkpoint in float32, flat layout, with Qwen's ChatML template; do not change it."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    return write_checkpoint(folder, tiny_shape, Style(chat_template="chatml"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Converted:
    """`tiny_checkpoint` as float32 GGUF files; do not change them."""
    return convert(tiny_checkpoint, tmp_path_factory.mktemp("gguf"), "f32", "f32")


@pytest.fixture(scope="session")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Converted]:
    """The trained checkpoint as GGUF files of a text and a vision type, made once; do not change them."""

    @cache
    def made(text_type: str, vision_type: str) -> Converted:
        folder = tmp_path_factory.mktemp(f"nano-{text_type}-{vision_type}")
        return convert(NANO, folder, text_type, vision_type)

    return made


@pytest.fixture(scope="session")
def rpc_endpoint() -> Iterator[str]:
    """HOST:PORT of ggml's RPC server in a process of its own: a device with its own memory."""
    if not ggml.lib().ggml_backend_reg_by_name(b"RPC"):
        pytest.skip("llama-cpp-python was built without GGML_RPC")
    endpoint = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "support.rpc_server", endpoint]
    with subprocess.Popen(command, cwd=Path(__file__).parent, stdout=subprocess.DEVNULL) as server:
        try:
            wait_for_port(endpoint)
            yield endpoint
        finally:
            server.kill()
