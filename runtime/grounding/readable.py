"""Replies for people to read: the markup of boxes gives way to text, and boxes come in pixels.

Chat, captions, sessions, the server and `Reply.text` all take their text from here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qvl.runtime.grounding.box import SCALE, Box, Event, Parser, Size
from qvl.runtime.grounding.mention import picture_of

if TYPE_CHECKING:
    from qvl.runtime.vision.size import PictureInfo


class ReadableReply:
    """A reply that grows piece by piece.

    Args:
        parser_of: makes the parser of the model's family; see `qvl.runtime.prompt.rules.ParserFactory`.
        pictures: those of the prompt, in order.
        question: the text that was asked, which may name the picture that is meant.

    Attributes:
        raw: the text as the model wrote it.
        text: the text for people; that of the last pieces may wait until the end of a box.
        boxes: in JSON; see `json`.
        problems: mistakes in the markup, in words.
    """

    def __init__(
        self,
        parser_of: Callable[..., Parser],
        pictures: Sequence[PictureInfo] = (),
        question: str = "",
    ) -> None:
        self.raw = self.text = ""
        self.boxes: list[Mapping[str, Any]] = []
        self.problems: list[str] = []
        self._pictures = pictures
        self._names = [picture.name or f"\0{i}" for i, picture in enumerate(pictures)]
        self._question = question
        self._parser = parser_of(choose=self._choose, resized=self._seen)

    def feed(self, raw: str) -> list[Event]:
        """Take in a piece of what the model wrote; returns what it completes."""
        self.raw += raw
        return self._keep(self._parser.feed(raw))

    def finish(self) -> list[Event]:
        """Take in the end of the reply."""
        return self._keep(self._parser.finish())

    def json(self, box: Box) -> dict[str, Any]:
        """The box as JSON: "label", and "box", "point" or "quad" in pixels of its picture as it is shown.

        "picture" is the picture's number in the prompt, from 1. Where the prompt has no picture that the box
        could be in, the coordinates stay thousandths of the width and height.
        """
        if box.picture is None:
            return box.json(SCALE, SCALE)
        return {**box.json(*self._pictures[box.picture - 1].size), "picture": box.picture}

    def _keep(self, events: list[Event]) -> list[Event]:
        for event in events:
            self.text += event.text
            if event.box is not None:
                self.boxes.append(self.json(event.box))
            if event.problem is not None:
                self.problems.append(event.problem)
        return events

    def _choose(self, before: str) -> tuple[int, Size] | None:
        if not self._pictures:
            return None
        number = picture_of(before, self._question, self._names)
        return number, self._pictures[number - 1].size

    def _seen(self, size: Size) -> Size:
        return next((picture.seen for picture in self._pictures if picture.size == size), size)


def read_reply(
    raw: str,
    parser_of: Callable[..., Parser],
    pictures: Sequence[PictureInfo] = (),
    question: str = "",
) -> ReadableReply:
    """A whole reply made readable; see `ReadableReply`."""
    reply = ReadableReply(parser_of, pictures, question)
    reply.feed(raw)
    reply.finish()
    return reply
