"""Tells pictures from videos by the suffix of their name, and by content where source code shares it."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

from qvl.runtime.files import open_file

Kind = Literal["image", "video"]


# What Pillow opens (`PIL.Image.registered_extensions`), without scientific containers (HDF5, GRIB, FITS),
# vector formats that need other programs (EPS, WMF) and MPEG, of which it reads the header only. HEIC, HEIF
# and JPEG XL need an extra; without it each is reported with that hint instead of being left out unseen.
IMAGE_SUFFIXES: Final = frozenset(
    f".{name}"
    for name in (
        *("apng", "avif", "avifs", "blp", "bmp", "bw", "cur", "dcx", "dds", "dib", "gif", "heic", "heics"),
        *("heif", "heifs", "hif", "icb", "icns", "ico", "im", "j2c", "j2k", "jfif", "jp2", "jpc", "jpe"),
        *("jpeg", "jpf", "jpg", "jpx", "jxl", "mpo", "msp", "pbm", "pcx", "pfm", "pgm", "png", "pnm", "ppm"),
        *("psd", "qoi", "ras", "rgb", "rgba", "sgi", "tga", "tif", "tiff", "vda", "vst", "webp", "xbm"),
        "xpm",
    )
)


VIDEO_SUFFIXES: Final = frozenset(
    f".{name}"
    for name in (
        *("3g2", "3gp", "asf", "avi", "divx", "dv", "f4v", "flv", "h264", "h265", "hevc", "m2t", "m2ts"),
        *("m2v", "m4v", "mjpeg", "mjpg", "mkv", "mov", "mp4", "mpe", "mpeg", "mpg", "mpv", "mts", "mxf"),
        *("ogm", "ogv", "qt", "rm", "rmvb", "ts", "vob", "webm", "wmv", "y4m"),
    )
)
_SHARED: Final = frozenset((".ts", ".mts"))  # with TypeScript
_BEGINNING: Final = 512


def kind_of(path: Path) -> Kind | None:
    """Kind of a path: a video, a picture, or neither."""
    suffix = path.suffix.lower()
    if suffix in _SHARED and not _is_binary(path):
        return None
    return "video" if suffix in VIDEO_SUFFIXES else "image" if suffix in IMAGE_SUFFIXES else None


def _is_binary(path: Path) -> bool:
    """True if a file begins with bytes that no text has; False where it cannot be read."""
    try:
        with open_file(path) as file:
            return b"\0" in file.read(_BEGINNING)
    except (OSError, ValueError):
        return False
