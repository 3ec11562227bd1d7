"""A model that answers by rote, and remembers what it was asked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from qvl.runtime.engine.reply import Reply


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
        return RoteStream(words, self.interrupt_after)

    def prefill(self, messages: list[dict[str, Any]], **kwargs: Any) -> None:
        self.looked_at.append(messages)


@dataclass
class RoteStream:
    pieces: list[str]
    interrupt_after: int | None
    dropped_messages: int = 0

    def __iter__(self) -> Iterator[Any]:
        for i, text in enumerate(self.pieces):
            if i == self.interrupt_after:
                raise KeyboardInterrupt
            yield SimpleNamespace(text=text)

    def cancel(self) -> None:
        self.pieces = []

    def result(self) -> Reply:
        return Reply("".join(self.pieces), (), "stop" if self.pieces else "cancelled")


def question(picture: Path, text: str) -> dict[str, Any]:
    return {
        "role": "user",
        "content": [{"type": "image", "image": str(picture)}, {"type": "text", "text": text}],
    }
