"""Fixtures that every test may use: a random tiny checkpoint, and the pair converted from it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings
from support.checkpoint import Shape, Style, write_checkpoint

from qvl.convert import Converted, convert

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
