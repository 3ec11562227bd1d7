"""Whether memory stays flat: captions 2,000 pictures of mixed sizes and watches the resident set.

    python benchmarks/caption_memory.py [-m MODEL] [--images 2000]

Prints the resident set after 200 pictures and at the end, each as the mean over a hundred pictures, since
what is read ahead comes and goes; fails if the end is over by more than 5%.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean

import numpy as np
from PIL import Image

from qvl.runtime import caption, load


def rss() -> float:
    """Resident set of this process, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def write(folder: Path, n: int) -> None:
    """Pictures from 40 to 1600 pixels a side, in several formats, a few of them broken."""
    random = np.random.default_rng(0)
    for i in range(n):
        w, h = (int(x) for x in np.exp(random.uniform(np.log(40), np.log(1600), 2)))
        suffix = ("jpg", "png", "webp")[i % 3]
        coarse = Image.fromarray(random.integers(0, 256, (12, 12, 3), np.uint8))
        coarse.resize((w, h)).save(folder / f"{i:05}.{suffix}")
        if i % 97 == 0:
            (folder / f"{i:05}-broken.jpg").write_bytes(b"\xff\xd8\xff" + random.bytes(100))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", "--model")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=16)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, load(args.model) as model:
        pictures = Path(folder) / "pictures"
        pictures.mkdir()
        write(pictures, args.images)
        started, sizes = time.perf_counter(), []
        for _ in caption(model, pictures, output=Path(folder) / "out.jsonl", max_tokens=args.tokens):
            sizes.append(rss())
            if len(sizes) % 200 == 0:
                rate = len(sizes) / (time.perf_counter() - started)
                print(f"{len(sizes):5} pictures  {mean(sizes[-100:]):7.1f} MB  {rate:6.1f} a second")
    first, last = mean(sizes[100:200]), mean(sizes[-100:])
    print(f"after 200: {first:.1f} MB, at the end of {len(sizes)}: {last:.1f} MB, {last / first - 1:+.1%}")
    sys.exit(last > 1.05 * first)


if __name__ == "__main__":
    main()
