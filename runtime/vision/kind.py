"""Tells pictures from videos by the suffix of their name."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

Kind = Literal["image", "video"]


# What Pillow opens (`PIL.Image.registered_extensions`), without scientific containers (HDF5, GRIB, FITS),
# vector formats that need other programs (EPS, WMF) and MPEG, of which it reads the header only. HEIC and
# HEIF need the `heif` extra; without it each is reported with that hint instead of being left out unseen.
IMAGE_SUFFIXES: Final = frozenset(
    f".{name}"
    for name in (
        *("apng", "avif", "avifs", "blp", "bmp", "bw", "cur", "dcx", "dds", "dib", "gif", "heic", "heics"),
        *("heif", "heifs", "hif", "icb", "icns", "ico", "im", "j2c", "j2k", "jfif", "jp2", "jpc", "jpe"),
        *("jpeg", "jpf", "jpg", "jpx", "mpo", "msp", "pbm", "pcx", "pfm", "pgm", "png", "pnm", "ppm"),
        *("psd", "qoi", "ras", "rgb", "rgba", "sgi", "tga", "tif", "tiff", "vda", "vst", "webp", "xbm"),
        "xpm",
    )
)


VIDEO_SUFFIXES: Final = frozenset(
    f".{name}" for name in ("avi", "m4v", "mkv", "mov", "mp4", "mpeg", "mpg", "ogv", "webm", "wmv")
)


def kind_of(path: Path) -> Kind | None:
    """What a path is by its name: a video, a picture, or neither."""
    suffix = path.suffix.lower()
    return "video" if suffix in VIDEO_SUFFIXES else "image" if suffix in IMAGE_SUFFIXES else None
