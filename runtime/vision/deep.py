"""Pictures of more than 8 bits a channel that Pillow gets wrong or does not read, through FFmpeg (PyAV).

Which these are was found by comparing Pillow 13 with FFmpeg, ImageMagick and OpenCV: RGB of 16 bits in
separate planes (TIFF: white throughout), RGB of 16 bits in JPEG 2000 (white becomes black), a transparent
colour of 16 bits (PNG), and what Pillow does not open: 16 bits in Photoshop files, floats in RGB.
"""

from __future__ import annotations

from typing import IO, Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

from qvl.runtime.vision.mend import PngHeader

_BITS, _SAMPLES, _PLANAR, _SAMPLE_FORMAT = 258, 277, 284, 339  # TIFF 6.0
_DEEP_KINDS: Final = ("a TIFF picture", "a Photoshop picture", "a JPEG 2000 picture")


def is_misread(image: Image.Image, file: IO[bytes], png: PngHeader | None) -> bool:
    """True if Pillow, having opened a picture, would decode other pixels than the file says."""
    if png is not None:
        return png.has_transparency and (png.depth, png.color_type) == (16, 2)
    if image.format == "TIFF":
        tags: Any = getattr(image, "tag_v2", {})
        bits = tags.get(_BITS, (1,))
        several = int(tags.get(_SAMPLES, 1)) > 1
        return several and max(_tuple(bits)) > 8 and tags.get(_PLANAR) == 2
    if image.format == "SGI":  # Pillow takes some runs that are in order for an overrun
        return _byte(file, 2) == 1
    if image.format == "JPEG2000" and image.mode in ("RGB", "RGBA", "YCbCr", "LA"):
        return _jpeg2000_depth(file) > 8
    return False


def _byte(file: IO[bytes], at: int) -> int:
    before = file.tell()
    file.seek(at)
    found = file.read(1)
    file.seek(before)
    return found[0] if found else -1


def _jpeg2000_depth(file: IO[bytes]) -> int:
    """Bits of the deepest component, by the SIZ marker (ISO 15444-1, A.5.1); 8 where it is not found."""
    at = file.tell()
    file.seek(0)
    head = file.read(1 << 16)
    file.seek(at)
    siz = head.find(b"\xff\x4f\xff\x51")
    if siz < 0 or len(head) < siz + 42:
        return 8
    n = int.from_bytes(head[siz + 40 : siz + 42], "big")
    return max(((depth & 0x7F) + 1 for depth in head[siz + 42 : siz + 42 + 3 * n : 3]), default=8)


def may_be_decoded(kind: str, file: IO[bytes]) -> bool:
    """True if FFmpeg may read a picture of a kind that Pillow does not open.

    It takes integers of 32 bits in a TIFF for floats, so these are left out.
    """
    if kind == "a TIFF picture":
        try:
            file.seek(0)
            ifd = TiffImagePlugin.ImageFileDirectory_v2(file.read(8))
            file.seek(ifd.next)
            ifd.load(file)
            bits, form = ifd.get(_BITS, (1,)), ifd.get(_SAMPLE_FORMAT, (1,))
        except Exception:  # a damaged header raises anything
            return False
        return max(_tuple(bits)) <= 16 or set(_tuple(form)) == {3}
    return kind in _DEEP_KINDS


def _tuple(value: Any) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)


def size_of(file: IO[bytes]) -> tuple[int, int]:
    """(width, height) from the header. Raises OSError: FFmpeg does not open it."""
    with _opened(file) as (_, stream):
        size = stream.codec_context.width, stream.codec_context.height
        if 0 in size:
            raise OSError("FFmpeg does not read its kind of samples")
        return size


def decode(file: IO[bytes]) -> Image.Image:
    """Decode a picture to mode RGB, or RGBA where it has alpha.

    Raises:
        OSError: it cannot be decoded.
    """
    with _opened(file) as (container, stream):
        import av

        try:
            frame = next(container.decode(stream))
        except (av.FFmpegError, StopIteration) as error:
            raise OSError(f"{error or 'no picture in it'}") from error
        has_alpha = any(component.is_alpha for component in frame.format.components)
        is_deep = max(component.bits for component in frame.format.components) > 8
        channels, deepest = ("rgba", "rgba64le") if has_alpha else ("rgb24", "rgb48le")
        pixels = frame.to_ndarray(format=deepest if is_deep else channels, interpolation="BICUBIC")
        return Image.fromarray(_in_8_bits(pixels) if is_deep else np.ascontiguousarray(pixels))


def _in_8_bits(pixels: NDArray[np.uint16]) -> NDArray[np.uint8]:
    out = np.empty(pixels.shape, np.uint8)
    for row, deep in zip(out, pixels, strict=True):
        row[:] = deep >> 8  # as Pillow takes the high byte of 16 bits in a PNG
    return out


class _opened:
    """A container over a file, which stays open, and its one stream."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._container: Any = None

    def __enter__(self) -> tuple[Any, Any]:
        try:
            import av
        except ImportError as error:
            raise OSError(f"PyAV, which reads it, cannot be imported: {error}") from error
        self._file.seek(0)
        try:
            self._container = av.open(_Unnamed(self._file), metadata_errors="replace", io_open=_refuse)
            stream = self._container.streams.video[0]
        except (av.FFmpegError, IndexError, ValueError) as error:
            raise OSError(str(error)) from error
        return self._container, stream

    def __exit__(self, *_: object) -> None:
        if self._container is not None:
            self._container.close()


class _Unnamed:
    def __init__(self, file: IO[bytes]) -> None:
        self.read, self.seek, self.tell, self.name = file.read, file.seek, file.tell, "picture"


def _refuse(url: str, flags: int, options: object) -> object:
    raise OSError(f"{url}: not opened")
