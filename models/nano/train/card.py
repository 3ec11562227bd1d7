"""The table of the model card, measured by `qvl` on GGUF files of three kinds and written into the card.

python -m qvl.models.nano.train.card --count 200
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import product
from pathlib import Path
from typing import Final

from qvl.models.nano.train.evaluate import SEED, row

NANO: Final = Path(__file__).resolve().parent.parent
TYPES: Final = {"F32": ("f32", "f32"), "Q8_0": ("q8_0", "q8_0"), "Q4_K_M": ("q4_k_m", "q8_0")}
ROWS: Final = (  # of evaluate's tasks and measures: what the card calls them, and what was aimed at
    ("describe 1", "exact", "describe 1 shape (kind, colour, size, place)", "0.95"),
    ("describe 2", "exact", "describe 2 shapes", "0.85"),
    ("describe 3", "exact", "describe 3 shapes", "0.70"),
    ("count", "exact", "count 1 to 6 (all, by colour, by kind; answers balanced)", "0.92"),
    ("ground", "iou", "ground one of 1 to 3 shapes, mean IoU", "0.75"),
    ("ground", "formed", "… well-formed boxes", "1.00"),
    ("read digits", "exact", "read 1 to 3 lines of up to 5 digits", "0.85"),
    ("read words", "exact", "read words", "0.70"),
    ("two pictures", "exact", "two pictures: which has the …, what differs", "0.90"),
    ("video", "exact", "video of 2 to 16 frames: what moves where, in what order", "0.85"),
    ("turns", "exact", "three turns about one picture (place, description, count), each answer", ""),
)
SHOWN: Final = {"iou": "IoU", "formed": "share"}
TABLE: Final = re.compile(r"(?<=<!-- table -->\n).*?(?=<!-- /table -->)", re.S)


@cache
def answerer(folder: Path):  # type: ignore[no-untyped-def]
    """The files' answers; a process opens each once, on one thread, for there is a process a core."""
    from qvl.models.nano.train.through_qvl import Answerer

    return Answerer(folder, threads=1)


def measured(folder: Path, task: str, count: int, seed: int) -> dict[str, float]:
    return row(answerer(folder), task, count, seed)


def measure(checkpoint: Path, count: int, seed: int) -> dict[tuple[str, str], dict[str, float]]:
    """Measures by type and task, of the checkpoint converted to every type."""
    from qvl.convert import convert

    # The long tasks first, so that no core is left with one of them at the end.
    tasks = sorted(
        {task for task, *_ in ROWS}, key=("turns", "video", "two pictures").__contains__, reverse=True
    )
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(os.cpu_count()) as pool:
        for name, types in TYPES.items():
            convert(checkpoint, Path(folder) / name, *types)
        jobs = {
            (name, task): pool.submit(measured, Path(folder) / name, task, count, seed)
            for task, name in product(tasks, TYPES)
        }
        for (name, task), job in jobs.items():
            print(f"{name:7} {task:13}", *(f"{k} {v:.3f}" for k, v in job.result().items()), flush=True)
        return {key: job.result() for key, job in jobs.items()}


def markdown(found: dict[tuple[str, str], dict[str, float]]) -> str:
    head = f"| task | measure | {' | '.join(TYPES)} | aimed at |\n|{' --- |' * (3 + len(TYPES))}\n"
    lines = [
        [label, SHOWN.get(kind, kind), *(f"{found[name, task][kind]:.2f}" for name in TYPES), aim]
        for task, kind, label, aim in ROWS
    ]
    return head + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=NANO)
    parser.add_argument("--count", type=int, default=200, help="conversations of each task")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--dry-run", action="store_true", help="print the table, and leave the card alone")
    args = parser.parse_args()
    started = time.monotonic()
    table = markdown(measure(args.checkpoint, args.count, args.seed))
    print(f"\n{table}\n{time.monotonic() - started:.0f} s")
    if not args.dry_run:
        card = args.checkpoint / "README.md"
        card.write_text(TABLE.sub(lambda _: table, card.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
