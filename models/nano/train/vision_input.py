"""Pictures to patches, as Qwen2VLImageProcessor does it (transformers, image_processing_qwen2_vl.py).

Kept as uint8 and with one frame a row: normalising and doubling the frame happen in the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from qvl.models.nano.train.answer import THINGS
from qvl.runtime.vision import dynamic_resolution, preprocess

PATCH, MERGE, FACTOR = 14, 2, 28
MIN_PIXELS, MAX_PIXELS = 24 * FACTOR**2, 36 * FACTOR**2
MEAN, STD = preprocess.MEAN, preprocess.STD
MAX_TOKENS = MAX_PIXELS // FACTOR**2
SHARE = 0.12  # a token shows a thing when it holds at least this share of it
COVERED = 0.18  # a patch counts as showing a thing when it covers at least this share


def smart_resize(height: int, width: int) -> tuple[int, int]:
    """(height, width) as multiples of 28 with the area in [MIN_PIXELS, MAX_PIXELS]: the runtime's."""
    return dynamic_resolution.smart_resize(height, width, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)


def resized(pixels: np.ndarray) -> np.ndarray:
    h, w = smart_resize(*pixels.shape[:2])
    if (h, w) == pixels.shape[:2]:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((w, h), Image.Resampling.BICUBIC))


def merge_order(array: np.ndarray) -> np.ndarray:
    """[gh * 14, gw * 14, ...] to [gh * gw, 14, 14, ...], 2x2 groups contiguous."""
    h, w = array.shape[0] // FACTOR, array.shape[1] // FACTOR
    rest = array.shape[2:]
    split = array.reshape(h, MERGE, PATCH, w, MERGE, PATCH, *rest)
    order = (0, 3, 1, 4, 2, 5, *range(6, split.ndim))
    return split.transpose(order).reshape(h * w * 4, PATCH, PATCH, *rest)


def patches(pixels: np.ndarray) -> np.ndarray:
    """uint8 [n, 588] of a resized picture: channel, row, column."""
    return merge_order(pixels).transpose(0, 3, 1, 2).reshape(-1, 3 * PATCH * PATCH)


@dataclass(frozen=True)
class Things:
    """Targets for the ids of a picture: class indices (0 is none) and the box in native pixels of each."""

    kind: list[int]
    colour: list[int]
    char: list[int]
    box: list[tuple[int, int, int, int]]


def targets(ids: np.ndarray, things: Things) -> dict[str, np.ndarray]:
    """Dense targets: kind, colour, char [n_patches]; box [n_tokens, 4] in tokens; shown [n_tokens]."""
    native_h, native_w = ids.shape
    h, w = smart_resize(native_h, native_w)
    if (h, w) != ids.shape:
        ids = np.asarray(Image.fromarray(ids).resize((w, h), Image.Resampling.NEAREST))
    tiles = merge_order(ids).reshape(-1, PATCH * PATCH).astype(np.int64)
    n, k = len(tiles), len(things.kind) + 1
    counts = np.bincount((tiles + np.arange(n)[:, None] * k).ravel(), minlength=n * k).reshape(n, k)
    counts[:, 0] = int(COVERED * PATCH * PATCH)
    owner = counts.argmax(1)
    whole = counts.reshape(-1, 4, k).sum(1)
    token_owner = whole.argmax(1)
    table = {
        name: np.array([0, *values], np.int64)
        for name, values in (("kind", things.kind), ("colour", things.colour), ("char", things.char))
    }
    scale = np.array([w / native_w, h / native_h] * 2, np.float32) / FACTOR
    seen = whole[:, 1:]
    cover = np.zeros(
        (len(whole), THINGS), bool
    )  # which tokens show which thing: much of it, or its best view
    cover[:, : k - 1] = (seen >= SHARE * seen.sum(0)) & (seen > 0)
    boxes = np.zeros((k, 4), np.float32)
    boxes[1:] = np.asarray(things.box, np.float32).reshape(-1, 4) * scale
    centre = np.full(THINGS, -1, np.int64)  # the one token in which the middle of a thing lies
    middle = (boxes[1:, :2] + boxes[1:, 2:]) / 2
    rows, cols = middle[:, 1].astype(int), middle[:, 0].astype(int)
    centre[: k - 1] = np.clip(rows, 0, h // FACTOR - 1) * (w // FACTOR) + np.clip(cols, 0, w // FACTOR - 1)
    return {
        "centre": centre,
        **{name: values[owner] for name, values in table.items()},
        "box": boxes[token_owner],
        "shown": token_owner > 0,
        "cover": cover,
    }
