"""What each type costs and is worth, on the embedded model: it is trained, so that quality is real.

    python benchmarks/quantization.py [--checkpoint models/nano]

Every pair of types is converted plain and with an importance matrix, compared with float32, and asked
questions whose answers are known. Writes quantization.json, and from it quantization.md,
and quantization.svg, which the README shows. Rows that the JSON has already for the same weights are not
measured again.
Needs the extra qvl[train], which draws the pictures.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import quantization_report
from numpy.typing import NDArray

from qvl.convert import Converted, convert
from qvl.convert.mixtures import TEXT_RECIPES
from qvl.models.nano.train.evaluate import SEED, Item, items, score
from qvl.models.nano.train.through_qvl import content
from qvl.runtime import load
from qvl.runtime.engine.units import Unit
from qvl.runtime.find import ModelFiles
from qvl.runtime.measure.calibrate import CalibrationPlan, calibrate
from qvl.runtime.measure.decoder import Vectors
from qvl.runtime.measure.machine import describe_machine
from qvl.runtime.measure.pair import Pair, Question
from qvl.runtime.measure.samples import Example
from qvl.runtime.measure.verify import Report, verify

HERE = Path(__file__).resolve().parent
TASKS = ("describe 1", "describe 2", "count", "read digits", "ground")
PAIRS = (
    ("bf16", "bf16"), ("q8_0", "q8_0"), ("q6_k", "q8_0"), ("q5_k_m", "q8_0"), ("q5_k_m", "q5_k"),
    ("q4_k_m", "q8_0"), ("q4_k_m", "q6_k"), ("q4_k_m", "q4_k"), ("q4_0", "q4_0"),
    ("iq4_xs", "q8_0"), ("iq4_xs", "iq4_xs"), ("q3_k_m", "q8_0"), ("q3_k_m", "q4_k"),
    ("iq3_xxs", "q8_0"), ("iq3_xxs", "iq3_xxs"), ("q2_k", "q8_0"), ("q2_k", "q4_k"), ("iq2_xs", "q8_0"),
)  # fmt: skip
NO_MATRIX = ("bf16", "q8_0")  # these make no choices that it could weigh
# Seeds of pictures: none that training or evaluation draws from.
CALIBRATION, HELD_OUT = SEED + 1_000_000, SEED + 2_000_000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=HERE.parent / "models/nano")
    parser.add_argument("--questions", type=int, default=20, help="of each task, with known answers")
    parser.add_argument("--samples", type=int, default=12, help="of each task, for the divergence")
    parser.add_argument("--calibration", type=int, default=30, help="of each task, for the importance matrix")
    parser.add_argument("--report", action="store_true", help="write the report of the JSON as it is")
    args = parser.parse_args()
    path = HERE / "quantization.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    if not args.report:
        settings = {
            "weights": digest(args.checkpoint), "questions": args.questions, "samples": args.samples,
            "calibration": args.calibration,
        }  # fmt: skip
        if results.get("settings") != settings:
            results = {"settings": settings, "rows": {}}
        results |= {"machine": asdict(describe_machine()), "date": datetime.date.today().isoformat()}
        with tempfile.TemporaryDirectory(prefix="qvl-quantization-") as folder:
            for _ in measure(args, Path(folder), results):
                path.write_text(json.dumps(results, indent=1) + "\n")
    quantization_report.write(results, HERE / "quantization.md", HERE / "quantization.svg")


def measure(args: argparse.Namespace, folder: Path, results: dict[str, Any]) -> Iterator[None]:
    """Fill in the rows that are missing, yielding after each."""
    rows = results["rows"]
    whole = convert(args.checkpoint, folder / "f32", "f32", "f32")
    matrix = folder / "imatrix.gguf"
    if any(not row_is_there(rows, *pair) for pair in PAIRS):
        calibrate(files(whole), CalibrationPlan(samples(args.calibration, CALIBRATION)), matrix, n_ctx=1024)
    held_out = samples(args.samples, HELD_OUT)
    asked = [item for task in TASKS for item in items(task, args.questions, SEED)]
    with Pair(files(whole), n_ctx=1024) as reference:
        truth = Remembered(reference)
        if "f32" not in rows:
            rows["f32"] = {
                "text": "f32",
                "vision": "f32",
                "imatrix": False,
                **size(whole),
                **answers(whole, asked),
            }
            yield
        for text, vision in PAIRS:
            for with_matrix in (False, True):
                key = f"{text} {vision}{' imatrix' if with_matrix else ''}"
                if key in rows or not possible(text, vision, with_matrix):
                    continue
                started = time.monotonic()
                made = convert(
                    args.checkpoint, folder / "row", text, vision, matrix if with_matrix else None, force=True
                )
                with Pair(files(made), n_ctx=1024) as pair:
                    default = (text, vision) == ("q4_k_m", "q8_0")
                    found = verify(pair, reference, held_out, truth=truth, attribute=default, max_tokens=48)
                rows[key] = {
                    "text": text, "vision": vision, "imatrix": with_matrix,
                    **size(made), **divergence(found), **answers(made, asked),
                }  # fmt: skip
                for made_file in (made.text, made.mmproj):
                    made_file.unlink()
                print(f"{key:24} {time.monotonic() - started:5.1f} s  {rows[key]['kl']:.2e}", flush=True)
                yield


class Remembered:
    """A reference whose answers are computed once for all rows."""

    def __init__(self, pair: Pair) -> None:
        self.name = pair.name
        self._pair = pair
        self._vectors: dict[tuple[Unit, ...], Vectors] = {}
        self._replies: dict[tuple[Unit, ...], list[int]] = {}
        self._logits: dict[tuple[Unit, ...], NDArray[np.float32]] = {}

    def encode(self, question: Question) -> Vectors:
        key = question.units
        if key not in self._vectors:
            self._vectors[key] = self._pair.encode(question)
        return self._vectors[key]

    def greedy(self, units: Sequence[Unit], vectors: Vectors, max_tokens: int) -> list[int]:
        key = tuple(units)
        if key not in self._replies:
            self._replies[key] = self._pair.greedy(units, vectors, max_tokens)
        return self._replies[key]

    def logits(self, units: Sequence[Unit], vectors: Vectors, reply: Sequence[int]) -> NDArray[np.float32]:
        key = tuple(units)
        if key not in self._logits:
            self._logits[key] = self._pair.logits(units, vectors, reply)
        return self._logits[key]


def possible(text: str, vision: str, with_matrix: bool) -> bool:
    if with_matrix:
        return not {text, vision} <= set(NO_MATRIX)
    return not (TEXT_RECIPES[text].needs_imatrix or vision == "iq3_xxs")


def row_is_there(rows: dict[str, Any], text: str, vision: str) -> bool:
    return not possible(text, vision, True) or f"{text} {vision} imatrix" in rows


def samples(count: int, seed: int) -> tuple[Example, ...]:
    """First questions about single pictures."""
    return tuple(
        Example(item.turns[0][0], item.pictures[0]) for task in TASKS for item in items(task, count, seed)
    )


def files(made: Converted) -> ModelFiles:
    return ModelFiles(made.text, made.mmproj)


def size(made: Converted) -> dict[str, Any]:
    """Bytes of weights, without vocabulary and header, and bits for each."""
    text, mmproj = (sum(t.n_bytes for t in f.by_type) for f in made.files)
    return {"text_bytes": text, "vision_bytes": mmproj}


def divergence(found: Report) -> dict[str, Any]:
    assert found.vision is not None
    return {
        "kl": found.together.kl_mean,
        "kl_p99": found.together.kl_p99,
        "kl_decoder": found.decoder.kl_mean,
        "top1": found.together.top1,
        "same_replies": found.together.same_replies,
        "vision_error": found.vision.relative,
        "worst_cosine": found.vision.worst_cosine,
        "n_tokens": found.together.n_tokens,
        "parts": {name: asdict(part)["kl_mean"] for name, part in found.parts.items()},
    }


def answers(made: Converted, asked: list[Item]) -> dict[str, Any]:
    """Scores by task, and the median seconds of a question."""
    scores: dict[str, list[float]] = {}
    seconds = []
    with load(made.text, made.mmproj, device="cpu", n_ctx=1024) as model:
        for item in asked:
            messages = [{"role": "user", "content": content(item, item.turns[0][0])}]
            started = time.monotonic()
            reply = model.generate(messages, max_tokens=64, temperature=0.0, repeat_penalty=1.0).result()
            seconds.append(time.monotonic() - started)
            found = score(item, [reply.raw])
            scores.setdefault(item.task, []).append(found.get("exact", found.get("iou", 0.0)))
    return {
        "scores": {task: statistics.mean(values) for task, values in scores.items()},
        "seconds": statistics.median(seconds),
    }


def digest(checkpoint: Path) -> str:
    """What tells one state of the weights from another."""
    total = hashlib.blake2b(digest_size=8)
    for path in sorted(checkpoint.glob("*.safetensors")):
        total.update(path.read_bytes())
    return total.hexdigest()


if __name__ == "__main__":
    main()
