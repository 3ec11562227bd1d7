"""Decodes any picture to RGB, as a viewer shows it.

Pillow decodes; this module settles what Pillow leaves open, and so does what transformers does
(`image_transforms.convert_to_rgb`: alpha over white) plus what it does not: EXIF orientation, 16 bit
and float samples scaled rather than clipped, and limits that are checked from the header, before a
pixel is decoded.

Every function here may be called from several threads at once.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import IO, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from qvl.runtime.errors import ImageError, shown
from qvl.runtime.files import open_file
from qvl.runtime.vision import deep
from qvl.runtime.vision.filetype import HEAD, HINTS, file_kind
from qvl.runtime.vision.mend import ended_jpegs, mended_png
from qvl.runtime.vision.pixels import note_alpha_bits, to_rgb
from qvl.runtime.vision.turns import Budget, Turn

ImageSource: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | NDArray[np.uint8]
"""A picture: a path, an encoded file's bytes, a PIL image, or uint8 [h, w, 3]."""

MAX_SOURCE_PIXELS = 178_956_970
"""Most pixels a source may have: where Pillow itself refuses by default (512 MB of RGB)."""

MAX_ASPECT_RATIO = 200
"""Longest side over shortest side; transformers' and qwen-vl-utils' `smart_resize` refuse more."""

_ORIENTATION_TAG = 0x0112
_ORIENTATIONS = {  # EXIF 2.32, 4.6.4, tag 0x0112: how to turn the stored picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Pillow would run Ghostscript on the first two, or ask Windows; of the others it reads headers alone.
_NOT_READ = frozenset(("EPS", "WMF", "MPEG", "HDF5", "GRIB", "BUFR", "FITS", "IPTC"))
_EXPECTED = "a picture (JPEG, PNG, WebP, GIF, TIFF, AVIF, BMP, …)"

# Pillow would print on stderr for large pictures that are within our limit, and for damaged metadata, which
# has no effect here. Appended, so that a filter set by the application still wins.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning, append=True)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.", append=True)

_decoding = Budget()
T = TypeVar("T")


def image_name(source: ImageSource) -> str:
    """Name a source in an error text: the path, or the kind and size of what was passed."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    if isinstance(source, Image.Image):
        filename = getattr(source, "filename", "")
        return os.fsdecode(filename) if filename else f"PIL image {source.width}x{source.height}"
    if isinstance(source, np.ndarray):
        return f"array {list(source.shape)}"
    return f"image data of {len(source)} bytes" if isinstance(source, bytes) else f"a {type(source).__name__}"


def open_image(source: ImageSource, *, max_source_pixels: int = MAX_SOURCE_PIXELS) -> NDArray[np.uint8]:
    """Read a picture as `open_picture` does, into an array; an array is returned as it is.

    Returns:
        uint8 [height, width, 3].

    Raises:
        ImageError: see `open_picture`.
    """
    if isinstance(source, np.ndarray):
        _check_array(source, image_name(source), max_source_pixels)
        return source
    return np.asarray(open_picture(source, max_source_pixels=max_source_pixels))


def open_picture(source: ImageSource, *, max_source_pixels: int = MAX_SOURCE_PIXELS) -> Image.Image:
    """Read a picture upright and in RGB; of an animation, the first frame.

    Transparency is composited over white. Samples of more than 8 bits are scaled to 8, not clipped.
    Colour profiles are ignored, as they were in training.

    Args:
        source: a path, encoded bytes, a PIL image, or a uint8 array [h, w, 3].
        max_source_pixels: refuse larger pictures before decoding. Above Pillow's own limit,
            `PIL.Image.MAX_IMAGE_PIXELS` has to be raised as well.

    Returns:
        A PIL image of mode RGB: what resizing takes, without a detour through an array.

    Raises:
        ImageError: no such file, not a picture, damaged, empty, over `max_source_pixels`, or with an
            aspect ratio over 200.
    """
    return with_picture(source, lambda picture: picture, max_source_pixels=max_source_pixels)


def with_picture(
    source: ImageSource,
    use: Callable[[Image.Image], T],
    *,
    max_source_pixels: int = MAX_SOURCE_PIXELS,
) -> T:
    """Read a picture as `open_picture` does and return `use` of it, such as a smaller one.

    The pixels in memory at a time are bounded, however many threads read pictures: see `turns`.
    """
    with Turn(_decoding) as turn:
        return use(_open(source, max_source_pixels, turn))


def _open(source: ImageSource, max_source_pixels: int, turn: Turn) -> Image.Image:
    name = image_name(source)
    if isinstance(source, np.ndarray):
        _check_array(source, name, max_source_pixels)
        return Image.fromarray(source)
    if isinstance(source, Image.Image):
        return _decode(source, name, max_source_pixels, turn)
    if isinstance(source, bytes):
        return _open_encoded(io.BytesIO(source), name, max_source_pixels, turn)
    if not isinstance(source, str | os.PathLike):
        raise ImageError(
            f"a picture is {shown(source)}, expected a path, bytes, a PIL image or a uint8 array [h, w, 3]"
        )
    try:
        with open_file(source) as file:
            return _open_encoded(file, name, max_source_pixels, turn)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        if isinstance(error, ImageError):
            raise
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: Exception) -> ImageError:
    """Word an OSError of opening a path."""
    if name.startswith(("http://", "https://")):
        return ImageError(f"{name}: expected a local file, found a URL", hint="download the picture first")
    if isinstance(error, FileNotFoundError):
        return ImageError(f"{name}: no such file", hint="check the path; quote it when it contains spaces")
    if isinstance(error, IsADirectoryError):
        return ImageError(f"{name}: expected {_EXPECTED}, found a folder", hint="name a file inside it")
    reason = getattr(error, "strerror", None) or error
    return ImageError(f"{name}: cannot be read: {reason}")


def _open_encoded(file: IO[bytes], name: str, max_source_pixels: int, turn: Turn) -> Image.Image:
    """Decode an encoded picture from a seekable binary file."""
    kind = file_kind(file.read(HEAD))
    file.seek(0)
    source, png = mended_png(file) if kind == "a PNG picture" else (file, None)
    try:
        image = Image.open(source, formats=_formats())
        note_alpha_bits(image, source)
        misread = deep.is_misread(image, source, png)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(
            f"{name}: its header declares more pixels than Pillow allows: {error}",
            hint="scale the picture down; in Python, PIL.Image.MAX_IMAGE_PIXELS is the limit",
        ) from error
    except UnidentifiedImageError as error:
        if deep.may_be_decoded(kind, file):
            return _decode_deep(file, name, kind, max_source_pixels, turn)
        raise _not_a_picture(file, name) from error
    except Exception as error:  # a plugin that trips over a hostile header raises anything
        raise ImageError(f"{name}: damaged picture header: {error}", hint="save the picture again") from error
    if misread:
        return _decode_deep(source, name, kind, max_source_pixels, turn, _orientation(image))
    try:
        return _decode(image, name, max_source_pixels, turn)
    except ImageError as error:
        if kind == "a JPEG picture" and isinstance(error.__cause__, OSError):
            return _without_end(file, error)
        raise


def _without_end(file: IO[bytes], error: ImageError) -> Image.Image:
    """A JPEG that Pillow calls truncated, if nothing but its end marker is missing; else that error."""
    variants = ended_jpegs(file)
    if not variants:
        raise error
    try:
        first, *others = (Image.open(data, formats=("JPEG",)) for data in variants)
        whole = all(other.tobytes() == first.tobytes() for other in others)
    except (OSError, ValueError, SyntaxError):
        raise error from None
    if not whole:
        raise error
    return _turned(to_rgb(first), _orientation(first))


def _decode_deep(
    file: IO[bytes], name: str, kind: str, max_source_pixels: int, turn: Turn, orientation: int = 1
) -> Image.Image:
    """Decode what Pillow does not read, or reads as other pixels, through FFmpeg."""
    try:
        width, height = deep.size_of(file)
        check_size(width, height, name, max_source_pixels)
        turn.wait(width * height)
        return _turned(to_rgb(deep.decode(file)), orientation)
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError(f"{name}: does not fit into memory", hint="scale it down") from error
    except Exception as error:  # OSError; ValueError of odd formats
        raise ImageError(
            f"{name}: {kind} of a kind that cannot be decoded, or damaged: {error}", hint=HINTS.get(kind)
        ) from error


def _not_a_picture(file: IO[bytes], name: str) -> ImageError:
    """Say what a file is that no decoder took."""
    file.seek(0)
    head = file.read(HEAD)
    kind = file_kind(head)
    if kind in ("a PNG picture", "a JPEG picture", "a GIF picture", "a WebP picture"):
        return ImageError(f"{name}: {kind} that is damaged or cut short", hint="download or save it again")
    hint = HINTS.get(kind, "its content is no picture, whatever its name says: name the picture itself")
    if kind.endswith("picture") and not hint.startswith("install"):
        return ImageError(f"{name}: {kind} of a kind that cannot be decoded, or damaged", hint=hint)
    if kind == "text":
        line = head.decode("utf-8", "replace").strip().partition("\n")[0].strip()
        kind = f"text that begins {line[:40]!r}" if line else "blank text"
    return ImageError(f"{name}: expected {_EXPECTED}, found {kind}", hint=hint)


def _decode(image: Image.Image, name: str, max_source_pixels: int, turn: Turn) -> Image.Image:
    """Check the header's size, decode, and turn upright. The image is not changed, only loaded."""
    check_size(image.width, image.height, name, max_source_pixels)
    turn.wait(image.width * image.height)
    try:
        image.load()
        return _turned(to_rgb(image), _orientation(image))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name}: a part of it exceeds Pillow's pixel limit, {error}") from error
    except MemoryError as error:
        raise ImageError(
            f"{name}: {image.width}x{image.height} pixels do not fit into memory", hint="scale it down"
        ) from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, …
        detail = str(error) or type(error).__name__
        raise ImageError(
            f"{name}: {image.format or image.mode} picture of {image.width}x{image.height} "
            f"is damaged or cut short: {detail}",
            hint="fetch or save the picture again",
        ) from error


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    turn = _ORIENTATIONS.get(orientation)
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) when there is none or it cannot be read.

    Read after decoding: a PNG may carry EXIF behind its pixels, and Pillow turns a TIFF by itself.
    """
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged EXIF is no reason to refuse the pixels
        return 1


def _check_array(array: NDArray[np.uint8], name: str, max_source_pixels: int) -> None:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ImageError(
            f"{name}: expected uint8 [height, width, 3], found {array.dtype} {list(array.shape)}",
            hint="for other layouts pass PIL.Image.fromarray(array)",
        )
    check_size(array.shape[1], array.shape[0], name, max_source_pixels)


def check_size(width: int, height: int, name: str, max_source_pixels: int = MAX_SOURCE_PIXELS) -> None:
    """Check a picture's size, in pixels, before any of it is decoded.

    Raises:
        ImageError: no pixels, too many, or an aspect ratio over 200.
    """
    if width < 1 or height < 1:
        raise ImageError(f"{name}: {width}x{height} pixels, expected at least 1x1")
    if width * height > max_source_pixels:
        raise ImageError(
            f"{name}: {width}x{height} pixels are {width * height / 1e6:.1f} million, "
            f"the limit is {max_source_pixels / 1e6:.1f} million",
            hint="scale the picture down",
        )
    ratio = max(width, height) / min(width, height)
    if ratio > MAX_ASPECT_RATIO:
        raise ImageError(
            f"{name}: {width}x{height} has an aspect ratio of {ratio:.0f}, the limit is {MAX_ASPECT_RATIO}",
            hint="crop the picture",
        )


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """Formats that Pillow may decode: its own, and HEIC and JPEG XL where their extras are installed."""
    Image.init()
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_jxl")  # registers itself
    return tuple(name for name in Image.ID if name not in _NOT_READ)
