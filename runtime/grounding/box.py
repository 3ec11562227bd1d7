"""Boxes and events in a reply, and the scale of their coordinates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self, TypeAlias

from qvl.runtime.errors import InputError, shown

Size: TypeAlias = tuple[int, int]
Choose: TypeAlias = Callable[[str], tuple[int, Size] | None]
"""Given the readable reply up to a box: number and size of the picture that the box is in, if any."""
Resized: TypeAlias = Callable[[Size], Size]
"""Given a picture's (width, height): the size in which the model sees it."""


SCALE = 1000
"""Coordinates run from 0 to below this, over the width and over the height."""


@dataclass(frozen=True)
class Box:
    """The place of something in a picture.

    Attributes:
        label: what is there, as the model named it; empty if it did not.
        points: (x, y) in thousandths of the width and height: one point, the top left and the bottom right
            corner of a box, or the four corners of a quad in the model's order.
        picture: number of the picture that it is in, where there are several; see `runtime.pictures`.
    """

    label: str
    points: tuple[tuple[float, float], ...]
    picture: int | None = None

    @property
    def shape(self) -> Literal["point", "box", "quad"]:
        """A box is upright; a quad has four free corners."""
        return {1: "point", 2: "box"}.get(len(self.points), "quad")  # type: ignore[return-value]

    def pixels(self, width: int, height: int) -> tuple[tuple[int, int], ...]:
        """The points in pixels of the picture as it is shown, after EXIF rotation."""
        return tuple((round(x * width / SCALE), round(y * height / SCALE)) for x, y in self.points)

    def json(self, width: int, height: int) -> dict[str, Any]:
        """Return JSON: "label", and in pixels "box" as [left, top, right, bottom], "point" as [x, y]
        or "quad" as [[x, y], …]."""
        points = self.pixels(width, height)
        if self.shape == "box":
            return {"label": self.label, "box": [*points[0], *points[1]]}
        if self.shape == "point":
            return {"label": self.label, "point": list(points[0])}
        return {"label": self.label, "quad": [list(point) for point in points]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], width: int, height: int) -> Self:
        """The reverse of `json`, for a picture of this size in pixels.

        Raises:
            InputError: it has another form.
        """
        try:
            if "box" in value:
                points = [value["box"][:2], value["box"][2:]]
            else:
                points = [value["point"]] if "point" in value else value["quad"]
            scaled = tuple((x * SCALE / width, y * SCALE / height) for x, y in points)
            return cls(str(value.get("label", "")), scaled, value.get("picture"))
        except (TypeError, ValueError, KeyError, AttributeError) as e:
            expected = 'a Box, or {"label", "box": [left, top, right, bottom]}, in pixels'
            raise InputError(f"a box is {shown(value)}, expected {expected}") from e


def within(points: Sequence[tuple[float, float]], *, upright: bool) -> tuple[tuple[float, float], ...]:
    """Points in thousandths moved into the picture; the two of a box as its top left and bottom right."""
    inside = tuple((min(max(x, 0.0), SCALE - 1.0), min(max(y, 0.0), SCALE - 1.0)) for x, y in points)
    if not upright:
        return inside
    (left, right), (top, bottom) = (sorted(axis) for axis in zip(*inside, strict=True))
    return (left, top), (right, bottom)


def in_pixels(box: Box, size: Size) -> str:
    """A box as text in a reply: "[left, top, right, bottom]" or "[(x, y) …]", in pixels of a size."""
    corners = box.pixels(*size)
    if box.shape == "box":
        return f"[{', '.join(str(value) for point in corners for value in point)}]"
    return f"[{' '.join(f'({x}, {y})' for x, y in corners)}]"


@dataclass(frozen=True)
class Event:
    """A part of a reply.

    Attributes:
        text: what to show of it; the texts of all events make the readable reply.
        box: the box that `text` stands for, if it does.
        problem: what is wrong with this part of the reply, in words.
    """

    text: str
    box: Box | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Grounding:
    """A whole reply: readable text, its boxes, and what was wrong in it."""

    text: str
    boxes: tuple[Box, ...]
    problems: tuple[str, ...]


class Parser(Protocol):
    """Finds boxes in a reply that comes in pieces."""

    def feed(self, text: str) -> list[Event]:
        """Take in a piece of the reply; returns the events that it completes."""

    def finish(self) -> list[Event]:
        """Take in the end of the reply."""
