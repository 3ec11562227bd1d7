"""A captioner without a model, and runs with it; as a program, a run that can be killed."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from qvl.runtime.caption.bookkeeping import Stop
from qvl.runtime.caption.captioner import CaptionJob, Done
from qvl.runtime.caption.inputs import find_inputs
from qvl.runtime.caption.ledger import Ledger
from qvl.runtime.caption.prepare import Preparer
from qvl.runtime.caption.prompts import Prompts, Template
from qvl.runtime.caption.runner import Plan, Runner
from qvl.runtime.caption.sidecar import Sidecars, ledger_path
from qvl.runtime.caption.state import Mode
from qvl.runtime.vision.preprocess import Preprocessor


def said(job: CaptionJob, seed: int) -> str:
    """Reply of the fake, a function of the pixels, the prompt and the seed alone."""
    content = f"{job.frames.tobytes().hex()}{job.before}{job.after}{seed}"
    return f'caption {hashlib.sha256(content.encode()).hexdigest()[:12]}\nof two lines, "quoted"'


class FakeCaptioner:
    """Captions up to `slots` pictures together; those with an odd content take more steps."""

    def __init__(self, slots: int = 3, delay: float = 0.0) -> None:
        self.slots, self.delay = slots, delay
        self.jobs: dict[int, tuple[CaptionJob, int]] = {}
        self.submitted: list[CaptionJob] = []

    @property
    def free(self) -> int:
        return self.slots - len(self.jobs)

    @property
    def busy(self) -> bool:
        return bool(self.jobs)

    def submit(self, job: CaptionJob) -> None:
        assert self.free > 0
        self.submitted.append(job)
        self.jobs[job.key] = (job, 1 + job.frames.sum() % 3)

    def step(self) -> Sequence[Done]:
        time.sleep(self.delay)
        done = []
        for key, (job, steps) in list(self.jobs.items()):
            if steps > 1:
                self.jobs[key] = (job, steps - 1)
                continue
            del self.jobs[key]
            texts = tuple(said(job, seed) for seed in job.seeds)
            done.append(Done(key, texts, ("stop",) * len(texts), 10, 5, 0.01))
        return done


PREPROCESSOR = Preprocessor(min_pixels=28 * 28, max_pixels=56 * 56)


def write_pictures(folder: Path, n: int, seed: int = 0) -> list[Path]:
    """n different pictures, `000.png` and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    paths = [folder / f"{i:03}.png" for i in range(n)]
    for path in paths:
        height, width = random.integers(28, 60, 2)
        Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8)).save(path)
    return paths


def runner(
    folder: Path,
    out: Path | None,
    mode: Mode = "skip",
    *,
    delay: float = 0.0,
    sidecar: bool = False,
    **settings: object,
) -> tuple[Runner, Ledger]:
    """A run over a folder with the fake captioner; close the ledger."""
    inputs = find_inputs([str(folder)])
    ledger = Ledger(out or ledger_path(inputs.items, None), {"prompt": "Describe.", **settings}, mode)
    prepare = Preparer(PREPROCESSOR, Prompts(Template("Describe.")))
    plan = Plan(inputs.items, prepare, "fake", sidecars=Sidecars() if sidecar else None)
    return Runner(plan, FakeCaptioner(delay=delay), ledger, Stop()), ledger


def main() -> None:
    """`python caption_fakes.py FOLDER OUT|- MODE DELAY`: prints each path once its caption is safe."""
    folder, out, mode, delay = sys.argv[1:]
    target = None if out == "-" else Path(out)
    run, ledger = runner(Path(folder), target, mode, delay=float(delay), sidecar=target is None)  # type: ignore[arg-type]
    with ledger:
        for record in run.run():
            os.write(1, f"{record.path}\n".encode())


if __name__ == "__main__":
    main()
