"""Filters for the patch embedding: whitened principal components of real patches.

A vision transformer sees colour long before shape; filters that tell patches apart bring shape forward.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from qvl.models.nano.train.draw import draw_scene
from qvl.models.nano.train.reading import sample_page
from qvl.models.nano.train.vision_input import MEAN, STD, patches, resized
from qvl.models.nano.train.world import sample_scene


def patch_filters(seed: int, width: int, pictures: int = 400) -> Tensor:
    """float32 [width, 3, 2, 14, 14]; each channel answers the data with about unit variance."""
    rng = np.random.default_rng((3, seed))
    rows = []
    for n in range(pictures):
        if n % 3:
            pixels = draw_scene(rng, sample_scene(rng, 1 + n % 6))[0]
        else:
            pixels = sample_page(rng, n % 2 == 0).pixels
        found = patches(resized(pixels)).astype(np.float32)
        busy = found.std(1) > 12
        rows.append(found[busy | (rng.random(len(found)) < 0.1)])
    data = np.concatenate(rows)
    mean, std = (np.repeat(np.array(v, np.float32) * 255, 196) for v in (MEAN, STD))
    data = (data - mean) / std
    values, vectors = np.linalg.eigh(data.T @ data / len(data))
    order = np.argsort(values)[::-1][:width]
    filters = vectors[:, order].T / np.sqrt(values[order] + 0.02)[:, None]
    half = torch.from_numpy(filters.astype(np.float32) / 2).view(width, 3, 1, 14, 14)
    return half.expand(width, 3, 2, 14, 14).contiguous()
