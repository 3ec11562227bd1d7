"""Loads the model that the options of a command name, and says on stderr what it is and how it runs."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from qvl.cli.options import ModelOptions
from qvl.cli.output import Output
from qvl.runtime.errors import InputError, QvlError
from qvl.runtime.files import expanded

if TYPE_CHECKING:
    from qvl.runtime.llama.repack import Optimize
    from qvl.runtime.model import Ahead, Model
    from qvl.runtime.vision.encoder import VisionEncoder


@contextmanager
def open_model(
    options: ModelOptions,
    out: Output,
    *,
    optimize: Optimize = "decode",
    use_cache: bool = False,
    ahead: Ahead | None = None,
) -> Iterator[Model]:
    """The model that the options name, loaded, and freed at the end.

    Args:
        optimize: what the decoder is to be fast at; see `qvl.runtime.load`.
        use_cache: keep the embeddings of pictures on disk, for the next time they are asked about.
        ahead: what to encode while the text model loads; see `qvl.runtime.load`.

    Raises:
        QvlError: what `qvl.runtime.load` raises.
    """
    _check(options.path)
    from qvl.runtime import load
    from qvl.runtime.files import default_directory
    from qvl.runtime.vision.cache import EmbeddingCache

    show_log(out)
    with out.progress("loading", "%", delay=1.0) as bar:
        cache = EmbeddingCache(default_directory(), memory_bytes=0) if use_cache else None
        model = load(
            options.path,
            **options.kwargs(),
            optimize=optimize,
            cache=cache,
            progress=lambda share: bar(share, 1.0),
            ahead=ahead,
        )
    with model:
        if _is_embedded(model):
            from qvl.models import embedded

            out.dim(embedded.INTRODUCTION)
        else:
            from qvl.cli.local import remember

            remember(model.path)
        if out.verbose and model.has_vision:
            out.detail(f"image encoder: {encoder_text(model.vision)}")
        yield model


def _is_embedded(model: Model) -> bool:
    """Return whether it is the embedded model, which is introduced lest it be taken for Qwen's."""
    from qvl.runtime.find import embedded_model

    try:
        return model.path.parent.resolve() == embedded_model().resolve()
    except QvlError:
        return False


def encoder_text(vision: VisionEncoder) -> str:
    """Whose kernels the image encoder runs on, and on what device."""
    from qvl.runtime.native import kernels

    level = kernels() if vision.device.is_cpu else None
    if level is not None and vision.precision != "exact":
        whose = f"qvl's {level.name} kernels"
    elif vision.device.is_cpu and level is None:
        why = "QVL_NATIVE=0" if os.environ.get("QVL_NATIVE") == "0" else "none of qvl's run on this processor"
        whose = f"ggml's kernels ({why}: slower than the published figures)"
    else:
        whose = "ggml's kernels"
    return f"{whose}, on {vision.device.name}"


def show_log(out: Output) -> None:
    """Shows the warnings of prompts and captions, and with -v llama.cpp's log too."""
    for name in ("qvl.prompt", "qvl.caption"):
        logging.getLogger(name).handlers[:] = [_Warnings(out)]
    logger = logging.getLogger("qvl.llama")
    logger.propagate = False
    logger.handlers[:] = [_Details(out) if out.verbose else logging.NullHandler()]
    logger.setLevel(logging.INFO if out.verbose else logging.CRITICAL)


class _Warnings(logging.Handler):
    def __init__(self, out: Output) -> None:
        super().__init__(logging.WARNING)
        self._out = out

    def emit(self, record: logging.LogRecord) -> None:
        self._out.warn(record.getMessage())


class _Details(logging.Handler):
    def __init__(self, out: Output) -> None:
        super().__init__()
        self._out = out

    def emit(self, record: logging.LogRecord) -> None:
        self._out.detail(record.getMessage().rstrip())


def _check(name: str | None) -> None:
    """Add hints for names given to `-m` that are no GGUF files."""
    if name is None or name == "embedded":
        return
    path = expanded(name)
    folder, colon, _ = name.rpartition(":")
    if colon and expanded(folder).is_dir():  # one of several types
        return
    hint = f"qvl convert {name} -o OUT makes GGUF files of it; then -m OUT"
    if not path.exists():
        is_hub_id = name.count("/") == 1 and not name.startswith(("/", ".", "~")) and path.suffix != ".gguf"
        raise InputError(
            f"{name}: no such file or folder", hint=hint if is_hub_id else "qvl models lists what to convert"
        )
    if (path / "config.json").is_file() and not any(path.glob("*.gguf")):
        raise InputError(f"{path}: a checkpoint, not GGUF files", hint=hint)
