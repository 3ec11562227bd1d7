"""Comparands of `qvl verify`: a GGUF pair, or a checkpoint that runs in transformers.

A checkpoint is also converted, without loss, to temporary GGUF files: they give the prompts their tokens,
and the parts that are swapped.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvl.cli.output import Output
from qvl.runtime.errors import InputError
from qvl.runtime.files import expanded

if TYPE_CHECKING:
    from qvl.runtime.measure.pair import Pair, Subject


@dataclass(frozen=True)
class Opened:
    """A pair of files, and what answers in its place, if anything."""

    pair: Pair
    subject: Subject | None = None


@contextmanager
def open_subject(name: str, mmproj: Path | None, out: Output, **options: Any) -> Iterator[Opened]:
    """Open what a name stands for.

    Raises:
        InputError: nothing there, or a checkpoint and no transformers to run it.
        GGUFError, CheckpointError: damaged files.
    """
    from qvl.runtime.measure.pair import Pair

    path = expanded(name)
    with ExitStack() as stack:
        if not is_checkpoint(path):
            yield Opened(stack.enter_context(Pair.open(path, mmproj, **options)))
            return
        subject = _in_transformers(path)
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="qvl-reference-"))
        from qvl.convert import convert

        with out.progress("reading the checkpoint") as advance:
            made = convert(path, folder, "f32", "f32", progress=advance)
        yield Opened(stack.enter_context(Pair.open(made.text, made.mmproj, **options)), subject)


def is_checkpoint(path: Path) -> bool:
    """A folder as Hugging Face has it, and no GGUF files in it."""
    return (path / "config.json").is_file() and not any(path.glob("*.gguf"))


def _in_transformers(path: Path) -> Subject:
    try:
        from qvl.cli.transformers_model import TransformersModel
    except ImportError as e:
        raise InputError(
            f"{path}: a checkpoint, which needs torch and transformers ({e.name} is missing)",
            hint='pip install "qvl[parity]", or convert it and compare with its GGUF files in f32 or bf16',
        ) from e
    return TransformersModel(path)
