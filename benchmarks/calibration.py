"""What an importance matrix saves of the embedded decoder's loss at q4_k_m, by how much it knows of inputs.

    python benchmarks/calibration.py

Products of inputs are forgotten beyond neighbourhoods of so many channels: with 1 only squares are left, and
the search weighs errors by them as llama.cpp's does; 64 of the decoder's 256 channels are what a block of 256
holds of a model 1024 wide. Each ratio is the mean, of logarithms, over copies of the model with its channels
in other orders, on pictures that were not calibrated on (tests/measure/test_embedded.py).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / "tests" / part) for part in ("", "measure")]
import test_embedded as embedded  # noqa: E402
from support.reordered import reorder  # noqa: E402

from qvl.convert import convert, feedback, quantize  # noqa: E402
from qvl.runtime.find import ModelFiles  # noqa: E402

WIDTHS: Final = (1, 16, 64, 128, 256)
PICTURES: Final = 40


def answers(folder: Path) -> list[embedded.Answered]:
    """What float32 says of pictures that are not calibrated on."""
    found = []
    with embedded.opened(convert(embedded.CHECKPOINT, folder, "f32", "f32")) as pair:
        for sample in embedded.drawn(embedded.SHOWN, embedded.ASKED):
            question = pair.read(sample)
            vectors = pair.encode(question)
            reply = pair.greedy(question.units, vectors, 32)
            logits = pair.logits(question.units, vectors, reply)
            found.append(embedded.Answered(question, vectors, reply, logits))
    return found


def forget_beyond(width: int) -> None:
    """Have conversions know products of channels in one neighbourhood only."""
    place = np.arange(embedded.BLOCK) // width
    near = place[:, None] == place

    def factors(products: NDArray[np.float32], name: str) -> feedback.Factors:
        return feedback.factors(np.where(near, products, np.float32(0)), name)

    quantize.factors = factors


def measure(seed: int, folder: Path, answered: list[embedded.Answered]) -> list[float]:
    """Logarithms of the ratios to no importance matrix, one for each of WIDTHS."""
    copy = reorder(embedded.CHECKPOINT, folder, seed)
    whole = convert(copy.checkpoint, folder / "f32", "f32", "f32")
    files = ModelFiles(whole.text, whole.mmproj)
    matrix = embedded.calibrated(files, folder / "i.gguf", PICTURES, embedded.CALIBRATION)

    def kl(imatrix: Path | None) -> float:
        made = convert(copy.checkpoint, folder, "q4_k_m", "q8_0", imatrix, force=True)
        return embedded.kl_of_decoder(made, answered, copy)

    plain, ratios = kl(None), []
    for width in WIDTHS:
        forget_beyond(width)
        ratios.append(float(np.log(kl(matrix) / plain)))
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--orders", type=int, default=6)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        answered = answers(Path(made) / "f32")
        rows = [measure(seed, Path(made) / str(seed), answered) for seed in range(args.orders)]
    errors = np.std(rows, axis=0, ddof=1) / len(rows) ** 0.5
    print("| channels | KL with / without | give or take |\n| ---: | ---: | ---: |")
    for width, mean, error in zip(WIDTHS, np.mean(rows, axis=0), errors, strict=True):
        print(f"| {width} | {np.exp(mean):.2f} | {error * np.exp(mean):.2f} |")


if __name__ == "__main__":
    main()
