"""Measure every level of the image encoder's kernels against ggml's own products of the same file.

    python benchmarks/kernels.py MMPROJ… [--side 448] [--rounds 3]

One thread, processor time, medians of rounds in which every level takes its turn, so that a busy machine
disturbs all alike. Results go to `kernels.json`, a table for each kind of processor to README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np

from qvl.runtime.measure.machine import describe_machine
from qvl.runtime.native import levels
from qvl.runtime.vision.encoder import VisionEncoder
from qvl.runtime.vision.preprocess import Patches

HERE: Final = Path(__file__).parent
BEGIN: Final = "<!-- kernels: begin -->"
END: Final = "<!-- kernels: end -->"


def measure(mmproj: Path, side: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of processor time to encode a picture of random patches, by level; "ggml" is exact mode."""
    n = side // 14
    pixels = np.random.default_rng(0).standard_normal((n * n, 1176), dtype=np.float32)
    patches = Patches(pixels, (1, n, n))
    encoders = {"ggml": VisionEncoder(mmproj, device="cpu", threads=1, precision="exact")}
    for level in levels():
        os.environ["QVL_NATIVE"] = level
        encoders[level] = VisionEncoder(mmproj, device="cpu", threads=1)
    os.environ.pop("QVL_NATIVE")
    seconds: dict[str, list[float]] = {level: [] for level in encoders}
    for turn in range(rounds + 1):  # the first warms up
        for level, encoder in encoders.items():
            start = time.process_time()
            encoder.encode_patches([patches])
            if turn:
                seconds[level].append(round(time.process_time() - start, 3))
    for encoder in encoders.values():
        encoder.close()
    return seconds


def table(cpu: str, result: dict[str, Any]) -> list[str]:
    """A processor's section: seconds of ggml, and each level's part of them."""
    names = [name for name in next(iter(result["types"].values())) if name != "ggml"]
    lines = [
        f"### {cpu} ({', '.join(result['instructions'])})",
        "",
        f"{result['date']}, {result['what']}, one thread. ggml {result['ggml']} compiled for this processor,",
        "its weights as they lie in the file (no AMX).",
        "",
        f"| type | ggml, s | {' | '.join(names)} |",
        f"| --- | ---: |{' ---: |' * len(names)}",
    ]
    for kind, seconds in result["types"].items():
        base = statistics.median(seconds["ggml"])
        ratios = (f"{statistics.median(seconds[name]) / base:.2f}" for name in names)
        lines.append(f"| {kind} | {base:.2f} | {' | '.join(ratios)} |")
    return [*lines, ""]


def write(results: dict[str, Any]) -> None:
    """Replace the section in README.md."""
    parts = [
        BEGIN,
        "## Kernels, by level and processor",
        "",
        "Written by `python benchmarks/kernels.py`: processor time of each level in parts of ggml's,",
        "same file, same processor, same run; below 1 we are faster. Levels below a processor's best",
        "are forced there: their ratio is against ggml's build for the better one.",
        "",
        *(line for cpu, result in results.items() for line in table(cpu, result)),
        END,
    ]
    path = HERE / "README.md"
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2] if begin else "\n"
    path.write_text(before.rstrip() + "\n\n" + "\n".join(parts) + after, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("mmproj", type=Path, nargs="+")
    parser.add_argument("--side", type=int, default=448)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--note", default="", help="what else to say of the machine")
    args = parser.parse_args(argv)
    machine = describe_machine()
    types = {path.stem.rpartition("-")[2]: measure(path, args.side, args.rounds) for path in args.mmproj}
    with VisionEncoder(args.mmproj[0], device="cpu") as encoder:
        depth, width = encoder.config.n_layer, encoder.config.n_embd
    what = f"{depth} layers of width {width}, {args.side}x{args.side}, {args.rounds} rounds"
    path = HERE / "kernels.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    results[machine.cpu] = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "what": f"{what}{', ' + args.note if args.note else ''}",
        "instructions": machine.instructions,
        "ggml": machine.ggml,
        "types": types,
    }
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    write(results)


if __name__ == "__main__":
    main()
