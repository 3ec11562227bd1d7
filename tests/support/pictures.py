"""Pictures to encode, and a TIFF writer for what no library of ours writes."""

from __future__ import annotations

import io
import struct

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def scene(height: int = 40, width: int = 56) -> NDArray[np.uint8]:
    """A smooth ramp with a red square on it and a white corner: no value stands for its negative."""
    ramp = np.linspace(20, 230, width).astype(np.uint8)
    picture = np.empty((height, width, 3), np.uint8)
    picture[..., 0], picture[..., 1], picture[..., 2] = ramp, 90, ramp[::-1]
    picture[8:24, 8:24] = (220, 30, 30)
    picture[:6, -6:] = 255
    return picture


def gray_of(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(rgb).convert("L"))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def tiff(
    planes: list[NDArray[np.generic]], photometric: int, sample_format: int = 1, order: str = "<"
) -> bytes:
    """One strip a plane, by TIFF 6.0; a plane is [h, w] or [h, w, samples]."""
    first = planes[0]
    samples = len(planes) if len(planes) > 1 else 1 if first.ndim == 2 else first.shape[2]
    bits = first.dtype.itemsize * 8
    data = b"".join(plane.astype(plane.dtype.newbyteorder(order)).tobytes() for plane in planes)
    size, at = len(data) // len(planes), 8 + len(data)
    extra = b""

    def values(kind: str, given: list[int]) -> int:
        nonlocal extra
        packed = struct.pack(f"{order}{len(given)}{kind}", *given)
        if len(packed) <= 4:
            return struct.unpack(f"{order}I", packed.ljust(4, b"\0"))[0]
        place = at + len(extra)
        extra += packed
        return place

    tags = [
        (256, 4, 1, first.shape[1]),
        (257, 4, 1, first.shape[0]),
        (258, 3, samples, values("H", [bits] * samples)),
        (259, 3, 1, values("H", [1])),
        (262, 3, 1, values("H", [photometric])),
        (273, 4, len(planes), values("I", [8 + i * size for i in range(len(planes))])),
        (277, 3, 1, values("H", [samples])),
        (278, 4, 1, first.shape[0]),
        (279, 4, len(planes), values("I", [size] * len(planes))),
        (284, 3, 1, values("H", [2 if len(planes) > 1 else 1])),
        (339, 3, samples, values("H", [sample_format] * samples)),
    ]
    mark = b"II*\0" if order == "<" else b"MM\0*"
    ifd = struct.pack(f"{order}H", len(tags)) + b"".join(struct.pack(f"{order}HHII", *tag) for tag in tags)
    return mark + struct.pack(f"{order}I", at + len(extra)) + data + extra + ifd + bytes(4)
