"""Boxes and points that a model writes as JSON, found while the reply streams.

Qwen2.5-VL and Qwen3-VL answer with lists or single objects, in a fence of ``` or bare, amid text:

    ```json
    [{"bbox_2d": [12, 40, 300, 512], "label": "the cup"}, {"point_2d": [33, 8], "label": "its handle"}]
    ```

Coordinates are pixels of the picture in the size in which the model sees it (Qwen2.5-VL), or thousandths of
its width and height (Qwen3-VL). The reply's text stays as it is; a box comes with the brace that closes its
object. What is no JSON, or no box, is text like any other; no text raises.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal, TypeAlias

from qvl.runtime.grounding.box import SCALE, Box, Choose, Event, Resized, Size, within

Unit: TypeAlias = Literal["pixels", "thousandths"]
_POINTS: Final = {"bbox_2d": 2, "bbox": 2, "box_2d": 2, "point_2d": 1, "point": 1, "quad_2d": 4}
_LABELS: Final = ("label", "text_content", "name", "ref", "text")
_MOST_CHARACTERS: Final = 4000  # of one object; beyond, it is taken for text


class JsonBoxes:
    """Parses a reply in pieces, cut anywhere.

    Args:
        size: (width, height) in pixels of the picture that the boxes are in, as it is shown.
        choose: for several pictures; see `Choose`.
        resized: the size in which the model sees a picture of a size; needed for "pixels".
        unit: of the coordinates.
    """

    def __init__(
        self,
        size: Size | None = None,
        choose: Choose | None = None,
        resized: Resized | None = None,
        unit: Unit = "thousandths",
    ) -> None:
        self._size, self._choose, self._resized, self._unit = size, choose, resized, unit
        self._shown = ""  # the reply so far
        self._starts: list[int] = []  # of the objects that are open, in `_shown`
        self._quoted = self._escaped = False

    def feed(self, text: str) -> list[Event]:
        """Take in a piece of the reply; returns the events that it completes."""
        return list(self._events(text))

    def finish(self) -> list[Event]:
        """Nothing: text is never held back."""
        return []

    def _events(self, text: str) -> Iterator[Event]:
        begin = 0
        for i, letter in enumerate(text):
            at = len(self._shown) + i - begin
            if not self._closes(letter, at):
                continue
            self._shown += text[begin : i + 1]
            start = self._starts.pop()
            found = self._object(self._shown[start : at + 1], self._shown[:start])
            boxes = [box for box in found if box is not None]
            problem = "a box without area, or of the wrong number of coordinates" if None in found else None
            yield Event(text[begin : i + 1], boxes[0] if boxes else None, problem)
            yield from (Event("", box) for box in boxes[1:])
            begin = i + 1
        if begin < len(text):
            self._shown += text[begin:]
            yield Event(text[begin:])

    def _closes(self, letter: str, at: int) -> bool:
        """Follow the braces; whether this letter closes an object."""
        if self._starts and at - self._starts[0] > _MOST_CHARACTERS:
            self._starts.clear()
            self._quoted = self._escaped = False
        if self._quoted:
            self._quoted = self._escaped or letter != '"'
            self._escaped = letter == "\\" and not self._escaped
            return False
        if letter == "{":
            self._starts.append(at)
        elif letter == '"' and self._starts:
            self._quoted = True
        return letter == "}" and bool(self._starts)

    def _object(self, text: str, before: str) -> list[Box | None]:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return []
        found = [(key, value[key]) for key in _POINTS if isinstance(value, Mapping) and key in value]
        return [self._box(key, given, self._label(value), before) for key, given in found]

    def _label(self, value: Mapping[str, Any]) -> str:
        found = next((value[key] for key in _LABELS if isinstance(value.get(key), str)), "")
        return " ".join(found.split())

    def _box(self, key: str, given: Any, label: str, before: str) -> Box | None:
        numbers = _flat(given)
        if numbers is None or len(numbers) != 2 * _POINTS[key]:
            return None
        chosen = self._choose(before) if self._choose else None
        picture, size = chosen or (None, self._size)
        scale = (float(SCALE), float(SCALE))
        if self._unit == "pixels" and size is not None:
            width, height = self._resized(size) if self._resized is not None else size
            scale = (float(max(width, 1)), float(max(height, 1)))
        pairs = zip(numbers[::2], numbers[1::2], strict=True)
        points = [(x / scale[0] * SCALE, y / scale[1] * SCALE) for x, y in pairs]
        inside = within(points, upright=len(points) == 2)
        if len(points) > 1 and (len({x for x, _ in inside}) == 1 or len({y for _, y in inside}) == 1):
            return None
        return Box(label, inside, picture)


def _flat(value: Any) -> list[float] | None:
    """The numbers of a list, or of a list of pairs; None where there is anything else."""
    if not isinstance(value, list) or len(value) > 8:
        return None
    items = [x for pair in value for x in pair] if all(isinstance(x, list) for x in value) else value
    if not all(isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 1e9 for x in items):
        return None
    return [float(x) for x in items if math.isfinite(x)]
