"""A model that answers by rote, and remembers what it was asked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from qvl.runtime.engine.reply import Piece, Reply
from qvl.runtime.grounding.readable import ReadableReply
from qvl.runtime.grounding.tags import GroundingParser
from qvl.runtime.prompt.messages import question_of
from qvl.runtime.vision.size import PictureInfo


@dataclass
class RoteSession:
    """Answers "one", "two", … and remembers what it was asked."""

    prompts: list[list[dict[str, Any]]] = field(default_factory=list)
    settings: list[dict[str, Any]] = field(default_factory=list)
    looked_at: list[list[dict[str, Any]]] = field(default_factory=list)
    interrupt_after: int | None = None
    answer: str = "reply {} end"
    n_ctx: int = 4096

    def generate(self, messages: list[dict[str, Any]], **kwargs: Any) -> Any:
        self.prompts.append(messages)
        self.settings.append(kwargs)
        words = [word for word in re.split(r"(?<= )", self.answer.format(len(self.prompts))) if word]
        pictures = [part["image"] for m in messages if isinstance(m["content"], list)
                    for part in m["content"] if part["type"] == "image"]  # fmt: skip
        sizes = [(Image.open(path).size, Path(path).name) for path in pictures]
        infos = [PictureInfo(size, size, name) for size, name in sizes]
        return RoteStream(words, self.interrupt_after, infos, question_of(messages))

    def prefill(self, messages: list[dict[str, Any]], **kwargs: Any) -> None:
        self.looked_at.append(messages)


@dataclass
class RoteStream:
    pieces: list[str]
    interrupt_after: int | None
    pictures: list[PictureInfo]
    question: str
    dropped_messages: int = 0
    cancelled: bool = False

    def __post_init__(self) -> None:
        self._readable = ReadableReply(GroundingParser, self.pictures, self.question)

    def __iter__(self) -> Iterator[Piece]:
        for i, text in enumerate(self.pieces):
            if i == self.interrupt_after:
                raise KeyboardInterrupt
            yield Piece("".join(event.text for event in self._readable.feed(text)), (), raw=text)
        yield Piece("".join(event.text for event in self._readable.finish()), ())

    def cancel(self) -> None:
        self.cancelled = True

    def result(self) -> Reply:
        self._readable.finish()
        found = self._readable
        return Reply(
            found.text, (), "cancelled" if self.cancelled else "stop", raw=found.raw,
            boxes=tuple(found.boxes), problems=tuple(found.problems),
        )  # fmt: skip


def question(picture: Path, text: str) -> dict[str, Any]:
    return {
        "role": "user",
        "content": [{"type": "image", "image": str(picture)}, {"type": "text", "text": text}],
    }
