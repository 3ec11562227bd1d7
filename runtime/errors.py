"""Every error that qvl raises on purpose.

    QvlError                     root; carries a message and a hint
    ├─ InputError                an argument that cannot be used
    │  ├─ ImageError             a picture that cannot be read, or is out of bounds
    │  ├─ VideoError             a video that cannot be read, or is out of bounds
    │  ├─ PromptError            messages that do not form a prompt
    │  └─ ContextFullError       a prompt that does not fit the context
    ├─ FormatError               a file whose content is damaged or not what it should be
    │  ├─ GGUFError              a GGUF file
    │  └─ CheckpointError        a Hugging Face checkpoint
    ├─ OutputError               a result that cannot be written (exists, full disk, locked)
    ├─ DownloadError             a file that could not be fetched
    ├─ BackendError              llama.cpp or ggml refused (device, memory, decode)
    └─ Cancelled                 stopped on request, between two steps of work

Whatever else comes out of qvl is a bug. Below them are the checks of arguments that raise InputError.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn


class QvlError(Exception):
    """An error with a message that says what is wrong and a hint that says what to do.

    Args:
        message: what was found and what was expected, naming the file.
        hint: what the user can do about it, or None.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class InputError(QvlError, ValueError):
    """An argument that cannot be used."""


class ImageError(InputError):
    """A picture that cannot be read, or whose size is out of bounds."""


class VideoError(InputError):
    """A video that cannot be read, or whose size is out of bounds."""


class PromptError(InputError):
    """Messages that do not form a prompt."""


class ContextFullError(InputError):
    """A prompt that does not fit the context.

    Args:
        n_tokens: KV cells the prompt needs.
        n_ctx: KV cells the context has.
    """

    def __init__(self, message: str, *, n_tokens: int, n_ctx: int, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.n_tokens = n_tokens
        self.n_ctx = n_ctx


class FormatError(QvlError):
    """A file whose content is damaged or not what it should be."""


class GGUFError(FormatError):
    """A GGUF file that is damaged, or of another kind than expected."""


class CheckpointError(FormatError):
    """A Hugging Face checkpoint that is damaged, incomplete, or of another architecture."""


class OutputError(QvlError):
    """A result that cannot be written: it exists, is locked, or the disk is full."""


class DownloadError(QvlError):
    """A file that could not be fetched."""


class BackendError(QvlError):
    """llama.cpp or ggml refused: no such device, out of memory, a failed decode."""


class Cancelled(QvlError):
    """Stopped on request, between two steps of work."""


class Unpicklable:
    """Base of objects that hold native memory or threads: pickling and copying them raises TypeError."""

    def __reduce__(self) -> NoReturn:
        what = f"{type(self).__name__} objects cannot be pickled or copied"
        raise TypeError(f"{what}; load the model from its path in each process")


def shown(value: Any, length: int = 80) -> str:
    """A value as messages show it, cut to a length."""
    try:
        return f"{value!r:.{length}}"
    except (ValueError, RecursionError):  # a number with thousands of digits, or endless nesting
        return type(value).__name__


def check_number(
    name: str,
    value: Any,
    least: float = -math.inf,
    most: float = math.inf,
    *,
    error: type[InputError] = InputError,
) -> float:
    """A finite int or float within bounds.

    Raises:
        InputError, or `error`: anything else, a bool included.
    """
    try:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and math.isfinite(value) and least <= value <= most:
            return float(value) if isinstance(value, float) else int(value)
    except OverflowError:  # an integer beyond what a float can hold
        pass
    raise error(f"{name} is {shown(value)}, expected {_bounds('a number', least, most)}")


def check_whole(
    name: str,
    value: Any,
    least: float = -math.inf,
    most: float = math.inf,
    *,
    error: type[InputError] = InputError,
) -> int:
    """An int within bounds.

    Raises:
        InputError, or `error`: anything else, a bool included.
    """
    if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
        return value
    raise error(f"{name} is {shown(value)}, expected {_bounds('a whole number', least, most)}")


def check_text(name: str, value: Any) -> str:
    """A string that C code can take: UTF-8, without NUL.

    Raises:
        InputError: anything else.
    """
    if not isinstance(value, str):
        raise InputError(f"{name} is {shown(value)}, expected a text")
    if "\0" in value:
        raise InputError(f"{name} holds a NUL character at {value.index(chr(0))}")
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise InputError(f"{name} is no Unicode text: {e.reason} at {e.start}") from e
    return value


def check_path(name: str, value: Any) -> Path:
    """A path given as a string or a path.

    Raises:
        InputError: anything else.
    """
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str):
        raise InputError(f"{name} is {shown(value)}, expected a path")
    if "\0" in os.fspath(value):
        raise InputError(f"{name} holds a NUL character: {shown(value)}")
    return Path(value)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """One of several words.

    Raises:
        InputError: anything else.
    """
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"{name} is {shown(value)}, expected one of {', '.join(choices)}")


def check_callable(name: str, value: Any) -> None:
    """A function, or None.

    Raises:
        InputError: anything else.
    """
    if value is not None and not callable(value):
        raise InputError(f"{name} is {shown(value)}, expected a function")


def _bounds(kind: str, least: float, most: float) -> str:
    if math.isinf(most):
        return kind if math.isinf(least) else f"{least} or more"
    return f"{kind} from {least} to {most}"
