"""Samples to fixed-shape batches: a shared prefix (system, pictures), and slots of several answers each.

Every answer sees the prefix and its own question, never another answer: one picture serves many single turns.
Positions restart after the picture for each of them, exactly as if it had been asked alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from qvl.models.nano.train.answer import THINGS
from qvl.models.nano.train.vision_input import (
    MAX_TOKENS,
    Things,
    patches,
    resized,
    smart_resize,
    targets,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PATCHES = MAX_TOKENS * 4
BOX = re.compile(r"<\|box_start\|>\((\d{1,3}),(\d{1,3})\),\((\d{1,3}),(\d{1,3})\)<\|box_end\|>")


@dataclass(frozen=True)
class Frame:
    """One temporal patch: one picture, or two frames of a clip."""

    first: np.ndarray
    second: np.ndarray | None
    ids: np.ndarray
    things: Things


@dataclass(frozen=True)
class Sample:
    """`kind` is image, pair, video or text; each turn list is one conversation about the frames."""

    kind: str
    frames: tuple[Frame, ...]
    turns: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]  # (task, ((question, answer), …))
    system: str | None
    question_first: str | None = None


@dataclass(frozen=True)
class Shape:
    """A bucket of batch shapes: samples, frames a sample, prefix length, slots and slot length."""

    batch: int
    frames: int
    prefix: int
    slots: int
    length: int


class Packer:
    def __init__(self, tokenizer: Tokenizer) -> None:
        def special(token: str) -> int:
            found = tokenizer.token_to_id(token)
            if found is None:
                raise ValueError(f"the tokenizer has no {token}")
            return found

        self.encode = lru_cache(maxsize=200_000)(lambda text: tuple(tokenizer.encode(text).ids))
        self.offsets = lru_cache(maxsize=200_000)(lambda text: tuple(tokenizer.encode(text).offsets))
        self.pad = special("<|endoftext|>")
        self.image = special("<|image_pad|>")
        self.box_start = special("<|box_start|>")
        self.box_end = special("<|box_end|>")
        self.video = special("<|video_pad|>")

    def batch(self, samples: list[Sample], shape: Shape, tasks: list[str]) -> dict[str, np.ndarray]:
        b, p, s, n = shape.batch, shape.prefix, shape.slots, shape.length
        total = b * shape.frames
        out: dict[str, Any] = {
            "patches": np.zeros((total, PATCHES, 588), np.uint8),
            "second": np.zeros((total, PATCHES, 588), np.uint8),
            "grid": np.ones((total, 2), np.int64),
            "kind": np.full((total, PATCHES), -100, np.int64),
            "colour": np.full((total, PATCHES), -100, np.int64),
            "char": np.full((total, PATCHES), -100, np.int64),
            "box": np.zeros((total, MAX_TOKENS, 4), np.float32),
            "shown": np.zeros((total, MAX_TOKENS), bool),
            "cover": np.zeros((total, MAX_TOKENS, THINGS), bool),
            "centre": np.full((total, THINGS), -1, np.int64),
            "prefix_ids": np.full((b, p), self.pad, np.int64),
            "prefix_pos": np.zeros((3, b, p), np.int64),
            "prefix_valid": np.zeros((b, p), bool),
            "spans": np.zeros((b, p, 2), np.int64),
            "vision_index": np.full((b, p), -1, np.int64),
            "ids": np.full((b, s, n), self.pad, np.int64),
            "pos": np.zeros((b, s, n), np.int64),
            "segment": np.zeros((b, s, n), np.int64),
            "labels": np.full((b, s, n), -100, np.int64),
            "task": np.full((b, s, n), -1, np.int64),
            "corners": np.full((b, s, n, 4), -1.0, np.float32),
            "about": np.full((b, s, n), -1, np.int64),
            "among": np.full((b, s, n), -1, np.int64),
            "match": np.full((b, p), -1, np.int64),
        }
        for i, sample in enumerate(samples):
            self._prefix(out, i, sample, shape)
            self._slots(out, i, sample, shape, tasks)
        prefix, length = out["prefix_valid"].sum(1).max(), (out["segment"] > 0).sum(2).max()
        for name in out:  # nothing is spent on room that no sample needs
            if name in ("prefix_ids", "prefix_valid", "vision_index", "spans", "match"):
                out[name] = out[name][:, :prefix]
            elif name in ("ids", "pos", "segment", "labels", "task", "corners", "about", "among"):
                out[name] = out[name][:, :, :length]
        out["prefix_pos"] = out["prefix_pos"][:, :, :prefix]
        return out

    def _frame(self, out: dict[str, np.ndarray], row: int, frame: Frame) -> tuple[int, int]:
        h, w = (v // 28 for v in smart_resize(*frame.first.shape[:2]))
        n = h * w
        first = patches(resized(frame.first))
        out["patches"][row, : n * 4] = first
        out["second"][row, : n * 4] = first if frame.second is None else patches(resized(frame.second))
        out["grid"][row] = h, w
        dense = targets(frame.ids, frame.things)
        for name in ("kind", "colour", "char"):
            out[name][row, : n * 4] = dense[name]
        out["box"][row, :n] = dense["box"]
        out["shown"][row, :n] = dense["shown"]
        out["cover"][row, :n] = dense["cover"]
        out["centre"][row] = dense["centre"]
        return h, w

    def _prefix(self, out: dict[str, np.ndarray], i: int, sample: Sample, shape: Shape) -> None:
        ids: list[int] = []
        pos: list[tuple[int, int, int]] = []
        index: list[int] = []
        at = 0

        def text(string: str) -> None:
            nonlocal at
            for token in self.encode(string):
                ids.append(token)
                pos.append((at, at, at))
                index.append(-1)
                at += 1

        if sample.system is not None:
            text(f"<|im_start|>system\n{sample.system}<|im_end|>\n")
        text("<|im_start|>user\n")
        if sample.question_first:
            text(sample.question_first)
        starts: list[tuple[int, int, int]] = []  # of each picture: where its tokens begin, and its grid
        spans = [sample.frames] if sample.kind == "video" else [(f,) for f in sample.frames]
        row = i * shape.frames
        for span in spans:
            text("<|vision_start|>")
            for t, frame in enumerate(span):
                h, w = self._frame(out, row, frame)
                starts.append((len(ids), h, w))
                for k in range(h * w):
                    ids.append(self.video if sample.kind == "video" else self.image)
                    pos.append((at + t, at + k // w, at + k % w))
                    index.append(row * MAX_TOKENS + k)
                row += 1
            at += max(len(span), h, w)
            text("<|vision_end|>")
            out["spans"][i, len(ids) - 1] = h, w
        if sample.kind == "pair" and starts[0][1:] == starts[1][1:]:  # the same place in both
            a, b, size = starts[0][0], starts[1][0], starts[0][1] * starts[0][2]
            out["match"][i, b : b + size] = np.arange(a, a + size)
        n = len(ids)
        if n > shape.prefix:
            raise ValueError(f"prefix of {n} tokens, room for {shape.prefix}")
        out["prefix_ids"][i, :n] = ids
        out["prefix_pos"][:, i, :n] = np.array(pos).T
        out["prefix_valid"][i, :n] = True
        out["vision_index"][i, :n] = index
        out["pos"][i] = at  # where every conversation starts

    def conversation(self, turns: tuple[tuple[str, str], ...]) -> tuple[list[int], list[bool]]:
        """Tokens after the picture, and which of them are answer."""
        ids: list[int] = []
        answer: list[bool] = []
        for n, (question, reply) in enumerate(turns):
            opening = "" if n == 0 else "\n<|im_start|>user\n"
            asked = self.encode(opening) + self.encode(question) if opening else self.encode(question)
            asked = asked + self.encode("<|im_end|>\n<|im_start|>assistant\n")
            said = self.encode(reply) + self.encode("<|im_end|>")
            ids += [*asked, *said]
            answer += [False] * len(asked) + [True] * len(said)
        return ids, answer

    def _slots(
        self, out: dict[str, np.ndarray], i: int, sample: Sample, shape: Shape, tasks: list[str]
    ) -> None:
        used = [0] * shape.slots
        base = int(out["pos"][i, 0, 0])
        for number, (task, turns) in enumerate(sample.turns, start=1):
            ids, answer = self.conversation(turns)
            n = len(ids)
            slot = next((k for k, u in enumerate(used) if u + n <= shape.length), None)
            if slot is None:
                continue
            a, b = used[slot], used[slot] + n
            used[slot] = b
            out["ids"][i, slot, a:b] = ids
            out["pos"][i, slot, a:b] = base + np.arange(n)
            out["segment"][i, slot, a:b] = number
            labels = np.array([*ids[1:], -100])
            labels[~np.array([*answer[1:], False])] = -100
            out["labels"][i, slot, a:b] = labels
            out["task"][i, slot, a:b] = tasks.index(task)
            self._corners(out["corners"][i, slot, a:b], ids, turns)
            for at, turn in zip(self._asked(turns), turns, strict=True):
                self._about(out["about"][i, slot, a + at : b], turn, "refs")
                self._about(out["among"][i, slot, a + at : b], turn, "groups")

    def _asked(self, turns: tuple[tuple[str, str], ...]) -> list[int]:
        """Offset of each question among the tokens of a conversation."""
        opening = len(self.encode("\n<|im_start|>user\n"))
        return [0] + [len(self.conversation(turns[:n])[0]) + opening for n in range(1, len(turns))]

    def _about(self, out: np.ndarray, turn: tuple[str, str], name: str) -> None:
        """Subject of the next token; from the end of the question on, that of the first token."""
        refs: tuple[tuple[int, int, int], ...] = getattr(turn, name, ()) if turn[1] else ()
        if not refs:
            return
        asked = len(self.encode(turn[0]))
        start = asked + len(self.encode("<|im_end|>\n<|im_start|>assistant\n"))
        first = -1
        for k, (a, b) in enumerate(self.offsets(turn[1])):
            thing = next((t for x, y, t in refs if a < y and b > x), -1)
            if k == 0:
                first = thing
            out[start + k - 1] = thing
        out[asked : start - 1] = first

    def _corners(self, out: np.ndarray, ids: list[int], turns: tuple[tuple[str, str], ...]) -> None:
        """The box (x1, y1, x2, y2) in 0 to 1 at each token in its brackets and at those
        between a question and the first box: that is where the thing asked for has to be found.
        """
        boxes = [m for turn in turns for text in turn for m in BOX.findall(text)]
        starts = [k for k, token in enumerate(ids) if token == self.box_start]
        ends = [k for k, token in enumerate(ids) if token == self.box_end]
        for box, a, b in zip(boxes, starts, ends, strict=True):
            out[a:b] = np.array([int(v) for v in box]) / 1000
        if len(turns) == 1 and boxes and not BOX.search(turns[0][0]):  # from the end of the question on
            asked = len(self.encode(turns[0][0]))
            out[asked : starts[0]] = out[starts[0]]
