"""Writes a picture with its boxes, never over an input, over another file only when that is wanted."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from qvl.runtime.atomic import refuse_input
from qvl.runtime.errors import OutputError

if TYPE_CHECKING:
    from PIL.Image import Image

_HINT = "name a .png or .jpg file"


class Exists(OutputError):
    """There is a file of this name already."""


def check_target(path: Path, *, inputs: Collection[Path] = (), force: bool = False) -> None:
    """See that a picture can be written, before the work that leads to it.

    Args:
        inputs: files that are asked about.
        force: another file of this name may be overwritten.

    Raises:
        Exists: there is a file. OutputError: an input, a folder, no picture's suffix, or no right to write.
    """
    from PIL import Image

    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        found = f"the suffix {path.suffix}" if path.suffix else "no suffix"
        raise OutputError(f"{path}: {found}, expected that of a picture", hint=_HINT)
    if path.is_dir():
        raise OutputError(f"{path}: a folder, expected a file", hint=f"{_HINT} in it")
    refuse_input(path, inputs)
    if not force and os.path.lexists(path):
        raise Exists(f"{path}: exists", hint="`force` overwrites it; or choose another name")
    folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not folder.is_dir():
        raise OutputError(f"{path}: {folder} is not a folder", hint="choose another")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{path}: the folder {folder} may not be written to", hint="choose another")


def write(picture: Image, path: Path, *, inputs: Collection[Path] = (), force: bool = False) -> None:
    """Save a picture, making its folder where there is none. Raises what `check_target` does."""
    from qvl.runtime.atomic import replacing

    check_target(path, inputs=inputs, force=force)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, durable=False) as file:
            picture.save(file, format=_format(path))
    except (OSError, ValueError) as e:
        raise OutputError(f"{path}: cannot be written: {getattr(e, 'strerror', None) or e}") from e


def _format(path: Path) -> str:
    from PIL import Image

    return Image.registered_extensions()[path.suffix.lower()]


def unused(path: Path) -> Path:
    """The path, or the first of `NAME-2.png`, `NAME-3.png`, … that does not exist."""
    found, n = path, 1
    while os.path.lexists(found):
        n += 1
        found = path.with_stem(f"{path.stem}-{n}")
    return found
