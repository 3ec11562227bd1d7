"""Any picture to RGB, as a viewer would show it.

Pillow decodes; this module settles what Pillow leaves open, and so does what transformers does
(`image_transforms.convert_to_rgb`: alpha over white) plus what it does not: EXIF orientation, 16 bit
and float samples scaled rather than clipped, and limits that are checked from the header, before a
pixel is decoded.

Every function here may be called from several threads at once.
"""

from __future__ import annotations

import io
import os
import threading
import warnings
from typing import IO, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from qvl.runtime.errors import ImageError
from qvl.runtime.files import open_file

ImageSource: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | NDArray[np.uint8]
"""What stands for a picture: a path, an encoded file's bytes, a PIL image, or uint8 [h, w, 3]."""

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

_KINDS: tuple[tuple[int, bytes, str], ...] = (  # offset, magic, what the file is
    (0, b"%PDF", "a PDF document"),
    (0, b"GGUF", "a GGUF model file"),
    (0, b"PK\x03\x04", "a zip archive or office document"),
    (0, b"\x1f\x8b", "gzip data"),
    (0, b"\x1aE\xdf\xa3", "a Matroska or WebM video"),
    (0, b"<svg", "an SVG drawing"),
    (0, b"<!DOCTYPE html", "a web page"),
    (0, b"<!doctype html", "a web page"),
    (0, b"<html", "a web page"),
    (0, b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
    (4, b"ftypheic", "a HEIC picture"),
    (4, b"ftypheix", "a HEIC picture"),
    (4, b"ftypmif1", "a HEIF picture"),
    (4, b"ftypavif", "an AVIF picture"),
    (4, b"ftyp", "an MP4 or QuickTime video"),
    (0, b"\x89PNG", "a PNG picture"),
    (0, b"\xff\xd8\xff", "a JPEG picture"),
    (0, b"GIF8", "a GIF picture"),
    (8, b"WEBP", "a WebP picture"),
)
HINTS = {  # for what is no picture, or none that this Pillow reads
    "a HEIC picture": "install support for it: pip install 'qvl[heif]'",
    "a HEIF picture": "install support for it: pip install 'qvl[heif]'",
    "an AVIF picture": "install a Pillow that was built with AVIF (11.3 and later wheels are)",
    "a PDF document": "save the page as a PNG first",
    "an SVG drawing": "save the drawing as a PNG first",
    "an MP4 or QuickTime video": "pass it as a video (`video`)",
    "a Matroska or WebM video": "pass it as a video (`video`)",
    "a Git LFS pointer, not the file itself": "run `git lfs pull`",
    "a web page": "what was downloaded is a page, or an error: save the picture itself",
    "an empty file": "it may not have been written or fetched to its end: save or fetch it anew",
}

_EXPECTED = "a picture (JPEG, PNG, WebP, GIF, TIFF, AVIF, BMP, …)"

# Pillow would print on stderr for large pictures that are within our limit, and for damaged metadata, which
# is no matter here. Appended, so that a filter set by the application still wins.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning, append=True)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin", append=True)

_heif_lock = threading.Lock()
_heif_state: bool | None = None


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
    name = image_name(source)
    if isinstance(source, np.ndarray):
        _check_array(source, name, max_source_pixels)
        return Image.fromarray(source)
    if isinstance(source, Image.Image):
        return _decode(source, name, max_source_pixels)
    if isinstance(source, bytes):
        return _open_encoded(io.BytesIO(source), name, max_source_pixels)
    if not isinstance(source, str | os.PathLike):
        raise ImageError(
            f"{name} is no picture: expected a path, bytes, a PIL image, or a uint8 array [h, w, 3]"
        )
    try:
        with open_file(source) as file:
            return _open_encoded(file, name, max_source_pixels)
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


def _open_encoded(file: IO[bytes], name: str, max_source_pixels: int) -> Image.Image:
    """Decode an encoded picture from a seekable binary file."""
    _register_heif()
    try:
        image = Image.open(file)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(
            f"{name}: its header promises more pixels than Pillow takes: {error}",
            hint="scale the picture down; in Python, PIL.Image.MAX_IMAGE_PIXELS is the limit",
        ) from error
    except UnidentifiedImageError as error:
        raise _not_a_picture(file, name) from error
    except Exception as error:  # a plugin that trips over a hostile header raises anything
        raise ImageError(f"{name}: damaged picture header: {error}", hint="save the picture anew") from error
    return _decode(image, name, max_source_pixels)


def file_kind(head: bytes) -> str:
    """Say in words what a file is, from its first bytes (64 do): for errors about files of another kind."""
    if not head:
        return "an empty file"
    kind = next((kind for at, magic, kind in _KINDS if head[at : at + len(magic)] == magic), None)
    if kind is None:
        is_text = all(byte >= 32 or byte in b"\t\r\n" for byte in head)
        kind = "text" if is_text else f"a file that begins with {head[:8]!r}"
    return kind


def _not_a_picture(file: IO[bytes], name: str) -> ImageError:
    """Say what a file is that no decoder took."""
    file.seek(0)
    head = file.read(512)
    kind = file_kind(head)
    if kind in ("a PNG picture", "a JPEG picture", "a GIF picture"):
        return ImageError(f"{name}: {kind} that is damaged or cut short", hint="fetch or save it anew")
    hint = HINTS.get(kind, "its content is no picture, whatever its name says: name the picture itself")
    if kind == "text":
        line = head.decode("utf-8", "replace").strip().partition("\n")[0].strip()
        kind = f"text that begins {line[:40]!r}" if line else "blank text"
    return ImageError(f"{name}: expected {_EXPECTED}, found {kind}", hint=hint)


def _decode(image: Image.Image, name: str, max_source_pixels: int) -> Image.Image:
    """Check the header's size, decode, and turn upright. The image is not changed, only loaded."""
    _check_size(image.width, image.height, name, max_source_pixels)
    try:
        image.load()
        rgb = _to_rgb(image)
        turn = _ORIENTATIONS.get(_orientation(image))
        return rgb if turn is None else rgb.transpose(turn)
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
            hint="fetch or save the picture anew",
        ) from error


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) when there is none or it cannot be read.

    Read after decoding: a PNG may carry EXIF behind its pixels, and Pillow turns a TIFF by itself.
    """
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged EXIF is no reason to refuse the pixels
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert a loaded image of any mode to mode RGB."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return _scaled_gray(image)
    if image.has_transparency_data:
        straight = image.convert("LA") if image.mode == "La" else image  # Pillow has no direct way from La
        layer = straight.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _scaled_gray(image: Image.Image) -> Image.Image:
    """Scale 16 bit, 32 bit and float grayscale to 8 bits.

    The white point is 65535 where the format says 16 bits. For modes that do not say (I and F) it is the
    smallest of 1 (floats only), 255 and 65535 that holds every sample; samples beyond, or below zero,
    are stretched from their minimum to their maximum.
    """
    samples = np.asarray(image)
    values = np.nan_to_num(samples.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = 0.0, 65535.0
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):  # PGM: Pillow scales to 65535
        smallest, largest = float(values.min()), float(values.max())
        whites = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        fitting = [white for white in whites if largest <= white]
        low, high = (0.0, fitting[0]) if fitting and smallest >= 0 else (smallest, largest)
    values -= low
    values *= 255.0 / max(high - low, 1e-30)
    gray = np.rint(values).clip(0, 255).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int | float):  # PNG tRNS of a gray picture: one sample value
        gray[samples == transparent] = 255
    return Image.fromarray(gray).convert("RGB")


def _check_array(array: NDArray[np.uint8], name: str, max_source_pixels: int) -> None:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ImageError(
            f"{name}: expected uint8 [height, width, 3], found {array.dtype} {list(array.shape)}",
            hint="for other layouts pass PIL.Image.fromarray(array)",
        )
    _check_size(array.shape[1], array.shape[0], name, max_source_pixels)


def _check_size(width: int, height: int, name: str, max_source_pixels: int) -> None:
    """Check a picture's size, in pixels, before any of it is decoded."""
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


def _register_heif() -> None:
    """Teach Pillow HEIC, once, when the `heif` extra is installed."""
    global _heif_state
    if _heif_state is not None:
        return
    with _heif_lock:
        if _heif_state is None:
            try:
                import pillow_heif
            except ImportError:
                _heif_state = False
            else:
                pillow_heif.register_heif_opener()
                _heif_state = True
