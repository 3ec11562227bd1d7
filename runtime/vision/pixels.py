"""Converts loaded pictures of any Pillow mode to RGB: alpha over white, deep samples scaled to 8 bits.

In bands of rows, so that temporary memory does not grow with the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import IO, Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_BAND: Final = 1 << 21  # pixels
_PHOTOMETRIC: Final = 262  # TIFF 6.0, section 8: PhotometricInterpretation; 0 is WhiteIsZero
_SAMPLE_FORMAT: Final = 339  # 1 unsigned, 2 signed, 3 float
_UINT32: Final = float(2**32 - 1)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a loaded image of any mode to mode RGB."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return _scaled_gray(image)
    if image.has_transparency_data and not _alpha_means_nothing(image):
        return _in_bands(image, _over_white)
    if image.mode in ("RGBA", "LA", "PA"):  # alpha that means nothing
        return _in_bands(image, _without_alpha)
    return image if image.mode == "RGB" else _in_bands(image, lambda band: band.convert("RGB"))


def _in_bands(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Convert some rows at a time; small pictures at once."""
    if image.width * image.height <= _BAND:
        return convert(image)
    out = Image.new("RGB", image.size)
    for top, bottom in _bands(image):
        band = image.crop((0, top, image.width, bottom))
        band.info = image.info  # a transparent colour stands there
        out.paste(convert(band), (0, top))
    return out


def _bands(image: Image.Image) -> Iterator[tuple[int, int]]:
    rows = max(1, _BAND // image.width)
    return ((top, min(top + rows, image.height)) for top in range(0, image.height, rows))


def _over_white(image: Image.Image) -> Image.Image:
    straight = image.convert("LA") if image.mode == "La" else image  # Pillow has no direct way from La
    layer = straight.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _without_alpha(image: Image.Image) -> Image.Image:
    return image.convert("RGBA").convert("RGB")


def _alpha_means_nothing(image: Image.Image) -> bool:
    """True if a TGA or BMP leaves its fourth channel unused: 0 throughout, as writers fill an unused channel.

    In TGA also where the descriptor counts no bits of alpha (Truevision TGA 2.0, field 5.6).
    """
    if image.format not in ("TGA", "BMP", "DIB") or image.mode != "RGBA":
        return False
    return image.info.get("alpha_bits") == 0 or image.getchannel("A").getextrema() == (0, 0)


def note_alpha_bits(image: Image.Image, file: IO[bytes]) -> None:
    """Keep a TGA's count of alpha bits, which Pillow does not read, for `to_rgb`."""
    if image.format == "TGA":
        at = file.tell()
        file.seek(17)
        descriptor = file.read(1)
        file.seek(at)
        image.info["alpha_bits"] = descriptor[0] & 15 if descriptor else 0


def _scaled_gray(image: Image.Image) -> Image.Image:
    """Scale 16 bit, 32 bit and float grayscale to 8 bits.

    The white point is 65535 where the format says 16 bits. For modes that do not say (I and F) it is the
    smallest of 1 (floats only), 255, 65535 and (unsigned) 2^32 - 1 that holds every sample; samples beyond,
    or below zero, are stretched from their minimum to their maximum. A TIFF whose white is zero is inverted.
    """
    tags: Any = getattr(image, "tag_v2", {})
    is_unsigned = image.mode == "I" and tags and _first(tags.get(_SAMPLE_FORMAT, 1)) == 1
    low, high = _range(image, bool(is_unsigned))
    inverted = bool(tags) and tags.get(_PHOTOMETRIC) == 0
    transparent = image.info.get("transparency")
    out = Image.new("L", image.size)
    for top, bottom in _bands(image):
        samples = _samples(image, top, bottom, bool(is_unsigned))
        values = np.nan_to_num(samples.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
        values -= np.float32(low)
        values *= np.float32(255.0 / max(high - low, 1e-30))
        gray = np.rint(values).clip(0, 255).astype(np.uint8)
        if inverted:
            gray = 255 - gray
        if isinstance(transparent, int | float):  # PNG tRNS of a gray picture: one sample value
            gray[samples == transparent] = 255
        out.paste(Image.fromarray(gray), (0, top))
    return out.convert("RGB")


def _range(image: Image.Image, is_unsigned: bool) -> tuple[float, float]:
    """The sample values that become black and white."""
    # Pillow scales a PGM to 65535 itself.
    if image.mode != "F" and (image.mode != "I" or image.format == "PPM"):
        return 0.0, 65535.0
    smallest, largest = np.inf, -np.inf
    for top, bottom in _bands(image):
        finite = np.nan_to_num(_samples(image, top, bottom, is_unsigned), nan=0.0, posinf=0.0, neginf=0.0)
        smallest, largest = min(smallest, float(finite.min())), max(largest, float(finite.max()))
    whites: tuple[float, ...] = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
    if is_unsigned and largest > _UINT32 / 16:
        whites = (_UINT32,)
    fitting = [white for white in whites if largest <= white]
    return (0.0, fitting[0]) if fitting and smallest >= 0 else (smallest, largest)


def _samples(image: Image.Image, top: int, bottom: int, is_unsigned: bool) -> NDArray[Any]:
    band = np.asarray(image.crop((0, top, image.width, bottom)))
    return band.view(np.uint32) if is_unsigned and band.dtype == np.int32 else band


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) else value
