"""Detokenizes sampled tokens for readers: whole characters, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from qvl.runtime.errors import InputError, shown
from qvl.runtime.llama.vocab import IncrementalText


class ReplyText:
    """Tokens to text that can be shown.

    Attributes:
        text: what was shown.
        cut: a stop string has ended the text.
    """

    def __init__(self, decoder: IncrementalText, stops: StopStrings) -> None:
        self._decoder = decoder
        self._stops = stops
        self.text = ""
        self.cut = False

    def feed(self, token: int) -> str:
        """The text that a token completes."""
        text, self.cut = self._stops.feed(self._decoder.feed(token))
        self.text += text
        return text

    def finish(self) -> str:
        """The text that was held back."""
        text = "" if self.cut else self._stops.feed(self._decoder.finish())[0] + self._stops.finish()
        self.text += text
        return text


class StopStrings:
    """Ends text before the first stop string, and holds back an end that could become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        if not isinstance(stops, list | tuple) or not all(isinstance(s, str) and s for s in stops):
            raise InputError(f"stop is {shown(stops)}, expected a list of strings, none of them empty")
        self._stops = tuple(stops)
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """Text that is safe to show, and whether a stop string was met."""
        held = self._held + text
        found = [i for i in (held.find(stop) for stop in self._stops) if i >= 0]
        if found:
            self._held = ""
            return held[: min(found)], True
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], False

    def finish(self) -> str:
        """The text that was held back, now that nothing follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that begins the stop string."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if stop.startswith(text[-n:])), 0)
