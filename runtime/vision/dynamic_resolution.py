"""Naive dynamic resolution (Qwen2-VL, arXiv 2409.12191, section 2.1).

A picture keeps its aspect ratio; each side becomes a multiple of 28 pixels (32 in Qwen3-VL), and every square
of that size one token. So the number of tokens follows the picture's size, within bounds of its area.
"""

from __future__ import annotations

import math

from qvl.runtime.errors import ImageError
from qvl.runtime.vision.grid import MERGE_SIZE, PATCH_SIZE, TOKEN_PIXELS
from qvl.runtime.vision.image import MAX_ASPECT_RATIO

# preprocessor_config.json of Qwen/Qwen2-VL-2B and its siblings
MIN_PIXELS = 4 * TOKEN_PIXELS
MAX_PIXELS = 16384 * TOKEN_PIXELS


def smart_resize(
    height: int,
    width: int,
    *,
    factor: int = PATCH_SIZE * MERGE_SIZE,
    min_pixels: int = MIN_PIXELS,
    max_pixels: float = MAX_PIXELS,
) -> tuple[int, int]:
    """The size nearest to a picture's own whose sides are multiples of `factor` and whose area is in bounds.

    Equal to transformers' function of this name (`image_processing_pil_qwen2_vl.py`) wherever that
    returns, Python's rounding of halves to even included. The bounds may be missed where both cannot be
    kept: by a picture so narrow that a side would be under `factor`, or with bounds close together.

    Args:
        height, width: the picture's size in pixels.
        factor: patch_size times merge_size, in pixels.
        min_pixels, max_pixels: bounds of the area, in pixels; qwen-vl-utils passes fractions for videos.

    Returns:
        (height, width) in pixels.

    Raises:
        ImageError: the aspect ratio is over 200, or a side is zero.
    """
    if min(height, width) < 1:
        raise ImageError(f"a picture of {width}x{height} pixels, expected at least 1x1")
    ratio = max(height, width) / min(height, width)
    if ratio > MAX_ASPECT_RATIO:
        raise ImageError(
            f"absolute aspect ratio must be smaller than {MAX_ASPECT_RATIO}, got {ratio}",
            hint="crop the picture",
        )
    h = round(height / factor) * factor
    w = round(width / factor) * factor
    if h * w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        h = max(factor, math.floor(height / shrink / factor) * factor)
        w = max(factor, math.floor(width / shrink / factor) * factor)
    elif h * w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        h = math.ceil(height * grow / factor) * factor
        w = math.ceil(width * grow / factor) * factor
    return h, w
