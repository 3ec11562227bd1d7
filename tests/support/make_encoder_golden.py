"""Write tests/fixtures/golden/encoder.npz: embeddings of the tests' tiny tower by transformers in float32.

python make_encoder_golden.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.checkpoint import Shape, Style, write_checkpoint
from support.patterns import pattern
from support.reference import vision_embeddings

from qvl.runtime.vision.preprocess import Preprocessor

SIZES = [(28, 28), (56, 84), (60, 100), (28, 140), (140, 57), (200, 200)]  # height, width

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(Path(folder) / "tiny", Shape(), Style(chat_template="chatml"))
        results = {}
        for height, width in SIZES:
            patches = Preprocessor().image(pattern(height, width))
            grids = [patches.grid_thw]
            results[f"{height}x{width}"] = vision_embeddings(checkpoint, patches.pixel_values, grids)
    np.savez_compressed(Path(__file__).parents[1] / "fixtures" / "golden" / "encoder.npz", **results)
