"""Boxes in a reply: parsed while it streams, mapped to pixels, shown as text.

Qwen2-VL names what it points at and where, in thousandths of the picture's width and height (paper, section
2.2.2, "Referring expression comprehension"; token names from the model's tokenizer):

    <|object_ref_start|>the cup<|object_ref_end|><|box_start|>(120,40),(300,512)<|box_end|>
    <|quad_start|>(10,10),(90,12),(88,40),(9,38)<|quad_end|>

A label holds for every box after it, until the next label. What does not follow the form is kept as text and
reported as a problem; no text raises.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TypeAlias

from qvl.runtime.grounding.box import SCALE, Box, Event, Grounding, Size

Choose: TypeAlias = Callable[[str], tuple[int, Size] | None]
"""Given the readable reply up to a box: number and size of the picture that the box is in, if any."""


_LABEL, _LABEL_END = "<|object_ref_start|>", "<|object_ref_end|>"
_BOX, _BOX_END = "<|box_start|>", "<|box_end|>"
_QUAD, _QUAD_END = "<|quad_start|>", "<|quad_end|>"
_TAGS = (_LABEL, _LABEL_END, _BOX, _BOX_END, _QUAD, _QUAD_END)
_SHAPES: dict[str, tuple[str, int]] = {_BOX: (_BOX_END, 2), _QUAD: (_QUAD_END, 4)}  # end, points
_TAG = re.compile("|".join(map(re.escape, _TAGS)))
_LONGEST_TAG = max(map(len, _TAGS))
_MOST_CHARACTERS = 200  # of the coordinates of one box; beyond, its end is taken to be missing

_NUMBER = r"-?\d+(?:\.\d+)?"
_POINT = re.compile(rf"\(\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\)")


class GroundingParser:
    """Parses a reply in pieces, cut anywhere.

    Args:
        size: (width, height) in pixels of the picture that the boxes are in, as it is shown; then their
            text is in pixels. None leaves thousandths.
        choose: for several pictures; see `Choose`.
    """

    def __init__(self, size: Size | None = None, choose: Choose | None = None) -> None:
        self._size, self._choose = size or (SCALE, SCALE), choose
        self._shown = ""
        self._held = ""  # not yet understood
        self._within = ""  # the start tag of what `_held` is in: of a label, a box, a quad, or none
        self._label = ""

    def feed(self, text: str) -> list[Event]:
        """What a piece of the reply completes."""
        self._held += text
        return list(self._events(finished=False))

    def finish(self) -> list[Event]:
        """What the end of the reply leaves."""
        return list(self._events(finished=True))

    def _events(self, *, finished: bool) -> Iterator[Event]:
        while self._held:
            tag = _TAG.search(self._held)
            if self._within in _SHAPES:
                limit = len(self._held) if tag is None else tag.start()
                if limit > _MOST_CHARACTERS:
                    # A tag that begins at the limit is complete by now, whichever way the text was cut.
                    if tag is None and not finished and limit < _MOST_CHARACTERS + _LONGEST_TAG:
                        return
                    yield self._fault(self._held[:_MOST_CHARACTERS], "has no end")
                    self._held = self._held[_MOST_CHARACTERS:]
                elif tag is not None:
                    self._held = self._held[tag.end() :]
                    if tag[0] == _SHAPES[self._within][0]:
                        yield self._shape(self._within, self._held_before(tag))
                    else:
                        yield self._fault(self._held_before(tag), f"ends with {tag[0]}")
                        if tag[0] in (_LABEL, _BOX, _QUAD):
                            yield from self._enter(tag[0])
                elif finished:
                    yield self._fault(self._held, "is cut off")
                    self._held = ""
                else:
                    return
            else:
                keep = 0 if tag is not None or finished else _overlap(self._held)
                shown = self._held_before(tag) if tag is not None else self._held[: len(self._held) - keep]
                self._held = self._held[tag.end() :] if tag is not None else self._held[len(shown) :]
                if shown:
                    yield self._text(shown)
                if tag is None:
                    break
                yield from self._enter(tag[0])
        if finished and self._within:
            problem = f"{self._within} has no end"
            self._within = ""
            yield Event("", problem=problem)

    def _held_before(self, tag: re.Match[str]) -> str:
        return tag.string[: tag.start()]

    def _text(self, text: str) -> Event:
        if self._within == _LABEL:
            self._label += text
        self._shown += text
        return Event(text)

    def _enter(self, tag: str) -> Iterator[Event]:
        """Take in a tag outside of a box."""
        if self._within == _LABEL and tag != _LABEL_END:
            yield Event("", problem=f"{_LABEL} ends with {tag}")
        elif self._within != _LABEL and tag in (_LABEL_END, _BOX_END, _QUAD_END):
            yield Event("", problem=f"{tag} without its start")
        if tag == _LABEL:
            self._label = ""
        self._within = tag if tag in (_LABEL, _BOX, _QUAD) else ""

    def _shape(self, start: str, content: str) -> Event:
        """Read the coordinates of a box or quad."""
        points = [(float(x), float(y)) for x, y in _POINT.findall(content)]
        expected = _SHAPES[start][1]
        if _POINT.sub("", content).replace(",", "").strip() or len(points) != expected:
            return self._fault(content, f"should hold {expected} points, (x,y)")
        inside = tuple((min(max(x, 0.0), SCALE - 1.0), min(max(y, 0.0), SCALE - 1.0)) for x, y in points)
        problem = None if list(inside) == points else f"{_name(start)} {_short(content)} is out of range"
        if start == _BOX:
            (left, right), (top, bottom) = (sorted(axis) for axis in zip(*inside, strict=True))
            inside = ((left, top), (right, bottom))
        if len({x for x, _ in inside}) == 1 or len({y for _, y in inside}) == 1:
            return self._fault(content, "has no area")
        self._within = ""
        chosen = self._choose(self._shown) if self._choose else None
        picture, size = chosen or (None, self._size)
        box = Box(" ".join(self._label.split()), inside, picture)
        corners = box.pixels(*size)
        if box.shape == "box":
            text = f"[{', '.join(str(value) for point in corners for value in point)}]"
        else:
            text = f"[{' '.join(f'({x}, {y})' for x, y in corners)}]"
        return Event(self._spaced(text), box, problem)

    def _fault(self, content: str, what: str) -> Event:
        """Show what was meant to be a box as it is, and say what is wrong with it."""
        problem = f"{_name(self._within)} {_short(content)} {what}"
        self._within = ""
        return Event(self._spaced(content) if content else "", problem=problem)

    def _spaced(self, text: str) -> str:
        gap = " " if self._shown and not self._shown[-1].isspace() else ""
        self._shown += gap + text
        return gap + text


def parse_grounding(text: str, size: tuple[int, int] | None = None) -> Grounding:
    """Parse a whole reply; see `GroundingParser`."""
    parser = GroundingParser(size)
    events = parser.feed(text) + parser.finish()
    return Grounding(
        "".join(event.text for event in events),
        tuple(event.box for event in events if event.box is not None),
        tuple(event.problem for event in events if event.problem is not None),
    )


def _overlap(text: str) -> int:
    """Length of the longest end of the text with which a tag could begin."""
    at = text.rfind("<", max(0, len(text) - _LONGEST_TAG + 1))
    return len(text) - at if at >= 0 and any(tag.startswith(text[at:]) for tag in _TAGS) else 0


def _name(start: str) -> str:
    return start.strip("<|>").removesuffix("_start")


def _short(content: str) -> str:
    return repr(content if len(content) <= 60 else content[:59] + "…")
