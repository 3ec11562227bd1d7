"""Write tests/fixtures/golden/towers.npz: embeddings of random towers by transformers and torch in float32.

python make_tower_golden.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.patterns import pattern
from support.tower_reference import reference
from support.tower_shapes import GOLDEN_SHAPES, GOLDEN_SIZES, SHAPES, preprocessor

if __name__ == "__main__":
    results = {}
    for name in GOLDEN_SHAPES:
        for height, width in GOLDEN_SIZES:
            patches = preprocessor(SHAPES[name]).image(pattern(height, width))
            rows = reference(SHAPES[name])(patches.pixel_values, [patches.grid_thw])
            results[f"{name} {height}x{width}"] = rows
    np.savez_compressed(Path(__file__).parents[1] / "fixtures" / "golden" / "towers.npz", **results)
