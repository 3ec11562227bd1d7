"""A picture's size from its header, for what is decided before decoding: cost, bounds, places of boxes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

from PIL import Image

from qvl.runtime.vision.image import open_picture

# Formats whose header says how the picture is turned; a PNG may say so behind its pixels.
_TOLD_BY_HEADER: Final = ("JPEG", "WEBP")
_ORIENTATION: Final = 0x0112
_TURNED: Final = (5, 6, 7, 8)  # by a quarter


@dataclass(frozen=True)
class PictureInfo:
    """A picture of a prompt, as far as boxes in the reply depend on it.

    Attributes:
        size: (width, height) in pixels as it is shown, after EXIF rotation.
        seen: (width, height) in pixels in which the model sees it.
        name: of its file; empty where it came without one.
    """

    size: tuple[int, int]
    seen: tuple[int, int]
    name: str = ""


def size_of(path: Path) -> tuple[int, int]:
    """Width and height in pixels of a picture, upright.

    Photographs are read as far as their header; damage behind it shows when they are decoded.

    Raises:
        ImageError: it cannot be read.
    """
    try:
        changed = path.stat().st_mtime_ns
    except OSError:  # opening it says what is wrong
        changed = 0
    return _size_of(path, changed)


@lru_cache(maxsize=64)
def _size_of(path: Path, changed: int) -> tuple[int, int]:
    return _from_header(path) or open_picture(path).size


def _from_header(path: Path) -> tuple[int, int] | None:
    try:
        if not path.is_file():
            return None
        with Image.open(path, formats=_TOLD_BY_HEADER) as image:
            width, height = image.size
            turned = image.getexif().get(_ORIENTATION) in _TURNED
    except Exception:  # of another format, or damaged: decoding says what is wrong
        return None
    return (height, width) if turned else (width, height)
