"""The table of the card, on fresh seeds: through `qvl` on GGUF files, or in torch on a training state.

    python -m qvl.models.nano.train.evaluate --gguf build/nano --count 200 --json table.json
    python -m qvl.models.nano.train.evaluate --state /var/tmp/qvl-nano/last.pt --count 200

In torch an answer is right when every token of the true answer is the most likely one given those before it:
that is exactly when greedy decoding says the true answer. Boxes are decoded.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qvl.models.nano.train import questions as ask
from qvl.models.nano.train.draw import draw_scene
from qvl.models.nano.train.pack import BOX, Frame
from qvl.models.nano.train.reading import read, sample_page
from qvl.models.nano.train.sequences import sample_clip, sample_pair
from qvl.models.nano.train.stream import clip_frames, page_things, scene_things
from qvl.models.nano.train.world import sample_scene

SEED = 20_000_000  # training draws from (1, seed, step, rank): never from these


@dataclass(frozen=True)
class Item:
    """One conversation: pictures of a still, a pair, or frames of a clip, and its true answers in turn."""

    task: str
    kind: str
    pictures: tuple[np.ndarray, ...]
    frames: tuple[Frame, ...]
    turns: tuple[tuple[str, str], ...]


def _still(task: str, rng: np.random.Generator, shapes: int, *wanted: str) -> Item | None:
    scene = sample_scene(rng, shapes)
    pixels, ids = draw_scene(rng, scene)
    turns = [ask.TASKS[w](rng, scene) for w in wanted]
    found = tuple(t for t in turns if t is not None)
    if len(found) < len(turns):
        return None
    return Item(task, "image", (pixels,), (Frame(pixels, None, ids, scene_things(scene)),), found)


def _count(rng: np.random.Generator, wanted: str) -> Item | None:
    return _still("count", rng, int(rng.integers(1, 7)), wanted)


def _ground(rng: np.random.Generator) -> Item | None:
    return _still("ground", rng, int(rng.integers(1, 4)), "ground")


def _read(task: str, rng: np.random.Generator) -> Item:
    page = sample_page(rng, task == "read digits")
    frame = Frame(page.pixels, None, page.ids, page_things(page))
    return Item(task, "image", (page.pixels,), (frame,), (read(rng, page),))


def _pair(rng: np.random.Generator) -> Item:
    clip = sample_pair(rng, 3)
    drawn = clip.draw(rng)
    frames = tuple(Frame(p, None, i, scene_things(s)) for s, (p, i) in zip(clip.scenes, drawn, strict=True))
    return Item("two pictures", "pair", tuple(p for p, _ in drawn), frames, (clip.qa[0][1],))


def _video(rng: np.random.Generator) -> Item:
    clip = sample_clip(rng, 2 * int(rng.integers(1, 9)))
    drawn = clip.draw(rng)
    return Item("video", "video", tuple(p for p, _ in drawn), clip_frames(clip, drawn), (clip.qa[0][1],))


def _turns(rng: np.random.Generator) -> Item | None:
    return _still("turns", rng, int(rng.integers(1, 4)), "where", "describe", "count_some")


MAKERS = {
    "describe 1": lambda rng: _still("describe 1", rng, 1, "describe"),
    "describe 2": lambda rng: _still("describe 2", rng, 2, "describe"),
    "describe 3": lambda rng: _still("describe 3", rng, 3, "describe"),
    "count": lambda rng: _count(rng, ("count_all", "count_some")[int(rng.integers(2))]),
    "ground": _ground,
    "read digits": lambda rng: _read("read digits", rng),
    "read words": lambda rng: _read("read words", rng),
    "two pictures": _pair,
    "video": _video,
    "turns": _turns,
}


def items(task: str, count: int, seed: int = SEED) -> Iterator[Item]:
    """`count` items of a task; the same ones for the same seed."""
    rng = np.random.default_rng((seed, list(MAKERS).index(task)))
    made = 0
    while made < count:
        item = MAKERS[task](rng)
        if item is not None:
            made += 1
            yield item


def iou(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    if w <= 0 or h <= 0:
        return 0.0
    inner = w * h
    return inner / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inner)


def score(item: Item, replies: list[str]) -> dict[str, float]:
    """Measures of one conversation: exact, or IoU and form for a box."""
    truth = [a for _, a in item.turns]
    if item.task != "ground":
        return {"exact": float(np.mean([r.strip() == t for r, t in zip(replies, truth, strict=True)]))}
    said, true = BOX.search(replies[0]), BOX.search(truth[0])
    if said is None or true is None:
        return {"iou": 0.0, "formed": 0.0}
    boxes = [tuple(int(v) for v in m.groups()) for m in (said, true)]
    return {"iou": iou(boxes[0], boxes[1]), "formed": 1.0}


def row(answer: Any, task: str, count: int, seed: int = SEED) -> dict[str, float]:
    """Mean measures of a task; `answer` takes an item and returns its replies."""
    rows = [score(item, answer(item)) for item in items(task, count, seed)]
    return {k: float(np.mean([r[k] for r in rows])) for k in rows[0]}


def table(answer: Any, count: int, tasks: list[str], seed: int) -> dict[str, dict[str, float]]:
    """`row` of each task."""
    out: dict[str, dict[str, float]] = {}
    for task in tasks:
        out[task] = row(answer, task, count, seed)
        print(f"{task:14}" + "  ".join(f"{k} {v:.3f}" for k, v in out[task].items()), flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gguf", type=Path, help="folder or text GGUF, run by qvl")
    parser.add_argument("--state", type=Path, help="training state, run in torch")
    parser.add_argument("--raw", action="store_true", help="with --state: not the running average")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--tasks", nargs="*", default=list(MAKERS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.gguf:
        from qvl.models.nano.train.through_qvl import Answerer

        with Answerer(args.gguf) as answerer:
            result = table(answerer, args.count, args.tasks, args.seed)
    else:
        from qvl.models.nano.train.in_torch import Teacher

        teacher = Teacher(args.state, average=not args.raw)
        result = table(teacher, args.count, args.tasks, args.seed)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
