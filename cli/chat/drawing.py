"""Where a picture with its boxes goes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from qvl.runtime.errors import OutputError

if TYPE_CHECKING:
    from PIL.Image import Image


def check_target(path: Path) -> None:
    """See that a picture can be written, before the work that leads to it.

    Raises:
        OutputError: a suffix that is no format's, or a folder that is not there or takes no files.
    """
    from PIL import Image

    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        found = f"the suffix {path.suffix}" if path.suffix else "no suffix"
        raise OutputError(f"{path}: {found}, expected that of a picture", hint="name a .png or .jpg file")
    if path.is_dir():
        raise OutputError(f"{path}: a folder, expected a file", hint="name a .png or .jpg file in it")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: there is no folder {path.parent}", hint="make it, or choose another")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(f"{path}: the folder may not be written to", hint="choose another")


def write(picture: Image, path: Path) -> None:
    """Save a picture. Raises OutputError."""
    check_target(path)
    try:
        picture.save(path)
    except (OSError, ValueError) as e:
        raise OutputError(f"{path}: cannot be written: {getattr(e, 'strerror', None) or e}") from e
