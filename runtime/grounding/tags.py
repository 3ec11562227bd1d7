"""Boxes in a reply: parsed while it streams, mapped to pixels, shown as text.

Qwen2-VL names what it points at and where, in thousandths of the picture's width and height (paper, section
2.2.2, "Referring expression comprehension"; token names from the model's tokenizer):

    <|object_ref_start|>the cup<|object_ref_end|><|box_start|>(120,40),(300,512)<|box_end|>
    <|quad_start|>(10,10),(90,12),(88,40),(9,38)<|quad_end|>

Qwen-VL writes the same with `<ref>`, `<box>` and `<quad>`.

A label holds for every box after it, until the next label. What does not follow the form is kept as text and
reported as a problem; no text raises.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from qvl.runtime.grounding.box import (
    SCALE,
    Box,
    Choose,
    Event,
    Grounding,
    Parser,
    Resized,
    Size,
    in_pixels,
    within,
)


@dataclass(frozen=True)
class Tags:
    """The names of the tags."""

    label: str
    label_end: str
    box: str
    box_end: str
    quad: str
    quad_end: str

    @property
    def all(self) -> tuple[str, ...]:
        """All six."""
        return self.label, self.label_end, self.box, self.box_end, self.quad, self.quad_end


QWEN2: Final = Tags(
    *(f"<|{name}_{end}|>" for name in ("object_ref", "box", "quad") for end in ("start", "end"))
)
QWEN: Final = Tags(*(f"<{slash}{name}>" for name in ("ref", "box", "quad") for slash in ("", "/")))
_MOST_CHARACTERS = 200  # of the coordinates of one box; beyond, its end is taken to be missing

_NUMBER = r"-?\d+(?:\.\d+)?"
_POINT = re.compile(rf"\(\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\)")


class GroundingParser:
    """Parses a reply in pieces, cut anywhere.

    Args:
        size: (width, height) in pixels of the picture that the boxes are in, as it is shown; then their
            text is in pixels. None leaves thousandths.
        choose: for several pictures; see `Choose`.
        resized: not needed: coordinates are relative.
        tags: their names.
    """

    def __init__(
        self,
        size: Size | None = None,
        choose: Choose | None = None,
        resized: Resized | None = None,
        tags: Tags = QWEN2,
    ) -> None:
        self._size, self._choose, self._tags = size or (SCALE, SCALE), choose, tags
        self._tag = re.compile("|".join(map(re.escape, tags.all)))
        self._longest = max(map(len, tags.all))
        self._shapes = {tags.box: (tags.box_end, 2), tags.quad: (tags.quad_end, 4)}  # end, points
        self._shown = ""
        self._held = ""  # not yet understood
        self._within = ""  # the start tag of what `_held` is in: of a label, a box, a quad, or none
        self._label = ""

    def feed(self, text: str) -> list[Event]:
        """Take in a piece of the reply; returns the events that it completes."""
        self._held += text
        return list(self._events(finished=False))

    def finish(self) -> list[Event]:
        """Take in the end of the reply."""
        return list(self._events(finished=True))

    def _events(self, *, finished: bool) -> Iterator[Event]:
        while self._held:
            tag = self._tag.search(self._held)
            if self._within in self._shapes:
                limit = len(self._held) if tag is None else tag.start()
                if limit > _MOST_CHARACTERS:
                    # A tag that begins at the limit is complete by now, whichever way the text was cut.
                    if tag is None and not finished and limit < _MOST_CHARACTERS + self._longest:
                        return
                    yield self._fault(self._held[:_MOST_CHARACTERS], "has no end")
                    self._held = self._held[_MOST_CHARACTERS:]
                elif tag is not None:
                    self._held = self._held[tag.end() :]
                    if tag[0] == self._shapes[self._within][0]:
                        yield self._shape(self._within, self._held_before(tag))
                    else:
                        yield self._fault(self._held_before(tag), f"ends with {tag[0]}")
                        if tag[0] in (self._tags.label, self._tags.box, self._tags.quad):
                            yield from self._enter(tag[0])
                elif finished:
                    yield self._fault(self._held, "is cut off")
                    self._held = ""
                else:
                    return
            else:
                keep = 0 if tag is not None or finished else self._overlap(self._held)
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
        if self._within == self._tags.label:
            self._label += text
        self._shown += text
        return Event(text)

    def _enter(self, tag: str) -> Iterator[Event]:
        """Take in a tag outside of a box."""
        if self._within == self._tags.label and tag != self._tags.label_end:
            yield Event("", problem=f"{self._tags.label} ends with {tag}")
        elif self._within != self._tags.label and tag in (
            self._tags.label_end,
            self._tags.box_end,
            self._tags.quad_end,
        ):
            yield Event("", problem=f"{tag} without its start")
        if tag == self._tags.label:
            self._label = ""
        self._within = tag if tag in (self._tags.label, self._tags.box, self._tags.quad) else ""

    def _shape(self, start: str, content: str) -> Event:
        """Read the coordinates of a box or quad."""
        points = [(float(x), float(y)) for x, y in _POINT.findall(content)]
        expected = self._shapes[start][1]
        if _POINT.sub("", content).replace(",", "").strip() or len(points) != expected:
            return self._fault(content, f"should hold {expected} points, (x,y)")
        upright = start == self._tags.box
        inside = within(points, upright=False)
        problem = None if list(inside) == points else f"{_name(start)} {_short(content)} is out of range"
        inside = within(inside, upright=upright)
        if len({x for x, _ in inside}) == 1 or len({y for _, y in inside}) == 1:
            return self._fault(content, "has no area")
        self._within = ""
        chosen = self._choose(self._shown) if self._choose else None
        picture, size = chosen or (None, self._size)
        box = Box(" ".join(self._label.split()), inside, picture)
        return Event(self._spaced(in_pixels(box, size)), box, problem)

    def _fault(self, content: str, what: str) -> Event:
        """Show what was meant to be a box as it is, and say what is wrong with it."""
        problem = f"{_name(self._within)} {_short(content)} {what}"
        self._within = ""
        return Event(self._spaced(content) if content else "", problem=problem)

    def _spaced(self, text: str) -> str:
        gap = " " if self._shown and not self._shown[-1].isspace() else ""
        self._shown += gap + text
        return gap + text

    def _overlap(self, text: str) -> int:
        """Length of the longest end of the text with which a tag could begin."""
        at = text.rfind("<", max(0, len(text) - self._longest + 1))
        return len(text) - at if at >= 0 and any(tag.startswith(text[at:]) for tag in self._tags.all) else 0


def parse_grounding(text: str, size: Size | None = None, parser: Parser | None = None) -> Grounding:
    """Parse a whole reply; see `GroundingParser`.

    Args:
        parser: a fresh one of the model's family; Qwen2-VL's unless given.
    """
    parser = parser or GroundingParser(size)
    events = [*parser.feed(text), *parser.finish()]
    return Grounding(
        "".join(event.text for event in events),
        tuple(event.box for event in events if event.box is not None),
        tuple(event.problem for event in events if event.problem is not None),
    )


def _name(start: str) -> str:
    return start.strip("<|>").removesuffix("_start")


def _short(content: str) -> str:
    return repr(content if len(content) <= 60 else content[:59] + "…")
