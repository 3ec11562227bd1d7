"""Pictures made by whole-number arithmetic: the same on every machine, and with detail at every scale."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def pattern(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """A picture of gradients, rings, hard edges and noise, uint8 [height, width, 3]."""
    y, x = np.mgrid[0:height, 0:width].astype(np.int64)
    noise = ((x * 1_103_515_245 + y * 12_345 + seed * 2_654_435_761) >> 7) % 97
    rings = (x * x + y * y * (seed % 3 + 1)) // 64
    gradient = (x * 255) // max(width - 1, 1) + (y * 255) // max(height - 1, 1)
    edges = 160 * (((x // 9 + y // 5 + seed) % 2) == 0)
    planes = [rings + noise, gradient + edges, edges + 2 * noise + rings // 3]
    return np.stack([plane % 256 for plane in planes], axis=-1).astype(np.uint8)
