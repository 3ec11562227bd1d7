"""Finds the answers about models/samples that the nano model gets right, for each kind of GGUF file.

    PYTHONPATH=tests python -m support.sample_answers            # print what is wrong, and what has changed
    PYTHONPATH=tests python -m support.sample_answers --write    # and bring the table up to date

The table is tests/nano/wrong_answers.json: what is known to be wrong, so that all the rest must be true.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qvl.convert import convert
from qvl.models.nano.train.evaluate import iou
from qvl.models.nano.train.pack import BOX
from qvl.runtime import load
from qvl.runtime.model import Model

ROOT: Final = Path(__file__).resolve().parents[2]
CHECKPOINT: Final = ROOT / "models" / "nano"
SAMPLES: Final = ROOT / "models" / "samples"
TABLE: Final = ROOT / "tests" / "nano" / "wrong_answers.json"
TYPES: Final = {"f32": "f32", "q8_0": "q8_0", "q4_k_m": "q8_0"}  # of the decoder, of the image encoder
LEAST_IOU: Final = 0.5


@dataclass(frozen=True)
class Question:
    """One question about a sample and its true answer, the text of a box where one is asked for."""

    files: tuple[str, ...]
    video: bool
    text: str
    truth: str

    @property
    def name(self) -> str:
        return f"{' '.join(self.files)}: {self.text}"

    @property
    def media(self) -> list[dict[str, Any]]:
        kind = "video" if self.video else "image"
        return [{"type": kind, kind: str(SAMPLES / name)} for name in self.files]

    def true(self, reply: str) -> bool:
        """True for a right reply: equal to the letter, or a box that overlaps by half."""
        said, box = (
            tuple(map(int, m.groups())) if (m := BOX.search(t)) else None for t in (reply, self.truth)
        )
        if box is None:
            return reply.strip() == self.truth
        return said is not None and iou(said, box) >= LEAST_IOU


def questions() -> Iterator[Question]:
    """Those of answers.json."""
    for record in json.loads((SAMPLES / "answers.json").read_text(encoding="utf-8")):
        files = tuple(record.get("files") or [record.get("file") or record["video"]])
        for text, truth in record["turns"]:
            yield Question(files, "video" in record, text, truth)
        if "ground" in record:
            yield Question(files, False, record["ground"]["question"], record["ground"]["box"])


def reply(model: Model, question: Question) -> str:
    content = [*question.media, {"type": "text", "text": question.text}]
    return model.generate([{"role": "user", "content": content}], max_tokens=60, temperature=0).result().raw


def main() -> None:
    known = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}
    wrong: dict[str, list[str]] = {}
    for text_type, vision_type in TYPES.items():
        with tempfile.TemporaryDirectory() as folder:
            made = convert(CHECKPOINT, Path(folder), text_type, vision_type)
            with load(made.text, made.mmproj, device="cpu", n_ctx=1024) as model:
                said = {q: reply(model, q) for q in questions()}
        wrong[text_type] = [q.name for q, text in said.items() if not q.true(text)]
        print(f"{text_type}: {len(said) - len(wrong[text_type])} of {len(said)} true")
        for q, text in said.items():
            if q.name in wrong[text_type]:
                new = "" if q.name in known.get(text_type, []) else ", new"
                print(f"  wrong{new}: {q.name} {text!r}, not {q.truth!r}")
            elif q.name in known.get(text_type, []):
                print(f"  true now: {q.name} {text!r}")
    if "--write" in sys.argv:
        TABLE.write_text(json.dumps(wrong, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
