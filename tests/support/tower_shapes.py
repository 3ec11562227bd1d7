"""The random towers on which every family is tested, and the pictures that they are shown."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from support.towers import TowerShape

from qvl.runtime.families.table import named
from qvl.runtime.vision.preprocess import Patches, Preprocessor

SHAPES = {
    "qwen2_5_vl: windows and full": TowerShape("qwen2_5_vl"),
    "qwen2_5_vl: ends in windows, head of 80": TowerShape("qwen2_5_vl", dim=160, full_every=3, ff=140),
    "qwen2_5_vl: full only": TowerShape("qwen2_5_vl", dim=32, heads=1, depth=3, full_every=1),
    "qwen2_5_vl: windows only, narrow": TowerShape("qwen2_5_vl", heads=4, depth=2, full_every=8, window=56),
    "qwen3_vl: deepstack of two": TowerShape("qwen3_vl"),
    "qwen3_vl: deepstack of three, head of 72": TowerShape(
        "qwen3_vl", dim=144, depth=5, ff=168, deepstack=(1, 2, 4), out=48
    ),
    "qwen3_vl: no deepstack, small table": TowerShape("qwen3_vl", heads=4, depth=2, deepstack=(), table=7),
    "qwen_vl: head of 104": TowerShape("qwen_vl", dim=208, depth=2, table=16),
    "qwen_vl: small pictures": TowerShape("qwen_vl", size=112, table=4, out=96, out_heads=3),
    "qwen_vl: table larger than the grid": TowerShape("qwen_vl", heads=4, size=168, table=16, depth=3),
}
"""At least three of each family but Qwen2-VL, which has tests/runtime/test_encoder.py."""

GOLDEN_SHAPES = ("qwen2_5_vl: windows and full", "qwen3_vl: deepstack of two", "qwen_vl: small pictures")
GOLDEN_SIZES = ((56, 56), (64, 100), (150, 170))  # height, width


def preprocessor(shape: TowerShape) -> Preprocessor:
    """The family's own, for the shape's size of picture, and for small pictures too."""
    own: Preprocessor = named(shape.family).tower.PREPROCESSOR
    if own.side:
        return Preprocessor(**{**vars(own), "side": shape.size})
    return own.with_pixels(min_pixels=own.factor**2)


def noise(shape: TowerShape, *grids: tuple[int, int, int], seed: int = 1) -> list[Patches]:
    """Random pixels for grids; Qwen-VL's are made square and of its size."""
    rng = np.random.default_rng(seed)
    own = preprocessor(shape)
    width = 3 * own.temporal_patch_size * own.patch_size**2
    side = shape.size // shape.patch
    found: Sequence[tuple[int, int, int]] = [(t, side, side) for t, _, _ in grids] if own.side else grids
    return [
        Patches(rng.standard_normal((t * h * w, width), dtype=np.float32), (t, h, w)) for t, h, w in found
    ]
