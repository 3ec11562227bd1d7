"""Tool calls in a reply, in the form of Qwen's templates: `<tool_call>{"name": …, …}</tool_call>`."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

_START, _END = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class Call:
    """A function that the model wants called; `arguments` is JSON text."""

    id: str
    name: str
    arguments: str

    def json(self, index: int | None = None) -> dict[str, Any]:
        """In OpenAI's shape."""
        function = {"name": self.name, "arguments": self.arguments}
        numbered = {} if index is None else {"index": index}
        return {**numbered, "id": self.id, "type": "function", "function": function}


class ToolParser:
    """Separates text from tool calls in a reply that comes in pieces. What is no valid call stays text."""

    def __init__(self) -> None:
        self._held = ""

    def feed(self, text: str) -> list[str | Call]:
        """Add a piece; returns the text and calls that it completes."""
        self._held += text
        return list(self._parts(finished=False))

    def finish(self) -> list[str | Call]:
        """End the reply; returns what was held back."""
        return list(self._parts(finished=True))

    def _parts(self, *, finished: bool) -> Iterator[str | Call]:
        while self._held:
            before, start, rest = self._held.partition(_START)
            if not start:
                keep = 0 if finished else _overlap(self._held)
                shown = self._held[: len(self._held) - keep]
                self._held = self._held[len(shown) :]
                if shown:
                    yield shown
                return
            if before.strip():
                yield before
            inside, end, after = rest.partition(_END)
            if not end:
                self._held = start + rest
                if finished:
                    self._held = ""
                    yield _call(inside) or start + rest
                return
            self._held = after.lstrip("\n")
            yield _call(inside) or start + inside + end


_MOST: Final = len(_START) - 1


def _overlap(text: str) -> int:
    return next((n for n in range(min(_MOST, len(text)), 0, -1) if text.endswith(_START[:n])), 0)


def _call(text: str) -> Call | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", {})
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return Call(f"call_{uuid.uuid4().hex[:24]}", found["name"], arguments)
