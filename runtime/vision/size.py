"""Size of a picture from its header, needed before decoding: for cost, bounds and places of boxes."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Final

from PIL import Image

from qvl.runtime.files import open_file
from qvl.runtime.vision.image import check_size, open_picture

# Formats whose header holds the size and, if there is one, the EXIF orientation
_FORMATS: Final = ("JPEG", "WEBP", "GIF", "BMP")
_ORIENTATION: Final = 0x0112
_TURNED: Final = (5, 6, 7, 8)  # by a quarter
_PNG: Final = b"\x89PNG\r\n\x1a\n"
_TEXTS: Final = (b"tEXt", b"zTXt", b"iTXt")
_ORIENTED: Final = (b"Raw profile type ", b"XML:com.adobe.xmp")  # keywords under which Pillow finds EXIF


@dataclass(frozen=True)
class PictureInfo:
    """Sizes of a picture in a prompt, on which boxes in the reply depend.

    Attributes:
        size: (width, height) in pixels as it is shown, after EXIF rotation.
        seen: (width, height) in pixels after resizing.
        name: of its file; empty where it came without one.
    """

    size: tuple[int, int]
    seen: tuple[int, int]
    name: str = ""


def size_of(path: Path) -> tuple[int, int]:
    """Width and height in pixels of a picture, upright.

    Common formats are read as far as their header; damage behind it shows when they are decoded.

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
    size = _from_header(path)
    if size is None:
        return open_picture(path).size
    check_size(*size, str(path))
    return size


def _from_header(path: Path) -> tuple[int, int] | None:
    try:
        with open_file(path) as file:
            if file.read(len(_PNG)) == _PNG:
                return _png_size(file)
            file.seek(0)
            with Image.open(file, formats=_FORMATS) as image:
                width, height = image.size
                turned = image.getexif().get(_ORIENTATION) in _TURNED
    except Exception:  # of another format, or damaged: decoding says what is wrong
        return None
    return (height, width) if turned else (width, height)


def _png_size(file: IO[bytes]) -> tuple[int, int] | None:
    """The size in IHDR; None if the file is cut short, or a chunk may say how the picture is turned."""
    size = None
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        content = file.read(min(length, 32)) if kind in (b"IHDR", *_TEXTS) else b""
        if kind == b"IHDR":
            width, height = struct.unpack(">II", content[:8])
            size = width, height
        elif kind == b"eXIf" or content.startswith(_ORIENTED):
            return None
        elif kind == b"IEND":
            return size
        file.seek(length - len(content) + 4, 1)  # with its CRC
    return None
