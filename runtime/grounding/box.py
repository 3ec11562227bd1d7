"""Boxes and events in a reply, and the scale of their coordinates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

Size: TypeAlias = tuple[int, int]


SCALE = 1000
"""Coordinates run from 0 to below this, over the width and over the height."""


@dataclass(frozen=True)
class Box:
    """Where something is in a picture.

    Attributes:
        label: what is there, as the model named it; empty if it did not.
        points: (x, y) in thousandths of the width and height: the top left and the bottom right corner of a
            box, or the four corners of a quad in the model's order.
        picture: number of the picture that it is in, where there are several; see `runtime.pictures`.
    """

    label: str
    points: tuple[tuple[float, float], ...]
    picture: int | None = None

    @property
    def shape(self) -> Literal["box", "quad"]:
        """A box is upright; a quad has four free corners."""
        return "box" if len(self.points) == 2 else "quad"

    def pixels(self, width: int, height: int) -> tuple[tuple[int, int], ...]:
        """The points in pixels of the picture as it is shown, after EXIF rotation."""
        return tuple((round(x * width / SCALE), round(y * height / SCALE)) for x, y in self.points)

    def json(self, width: int, height: int) -> dict[str, Any]:
        """As JSON: "label", and in pixels "box" as [left, top, right, bottom] or "quad" as [[x, y], …]."""
        points = self.pixels(width, height)
        if self.shape == "box":
            return {"label": self.label, "box": [*points[0], *points[1]]}
        return {"label": self.label, "quad": [list(point) for point in points]}


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
