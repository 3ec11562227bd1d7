"""Fits a conversation into the context: drops its oldest turns once it is full.

Whole turns go, never the system prompt or the last question. More are dropped than needed, so that the next
turns do not each prefill everything again; and dropped turns stay dropped while the conversation continues,
so that the KV cache's prefix holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from qvl.runtime.engine.units import Unit, VisionUnit, n_cells, n_vision_cells
from qvl.runtime.errors import ContextFullError
from qvl.runtime.prompt.messages import Message
from qvl.runtime.prompt.positions import VisionSpan

UnitsOf: TypeAlias = Callable[[Sequence[Message]], list[Unit]]

_KEEP_SHARE: Final = 0.75


@dataclass(frozen=True)
class Fitted:
    """The units of the messages that fit.

    Attributes:
        n_dropped: messages left out.
        n_new: how many of them were still read the last time.
    """

    units: list[Unit]
    n_dropped: int = 0
    n_new: int = 0


class Fitter:
    """Chooses messages, and remembers what it has dropped of a conversation."""

    def __init__(self, n_ctx: int, token_pixels: int = 0, n_trained: int = 1 << 30) -> None:
        """Begin without a conversation.

        Args:
            token_pixels: pixels of a picture that become one token; 0 where every picture has one size.
            n_trained: tokens of the longest context that the model was trained on.
        """
        self._n_ctx, self._token_pixels, self._n_trained = n_ctx, token_pixels, n_trained
        self.forget()

    def forget(self) -> None:
        """Begin a new conversation."""
        self._dropped: list[Unit] = []
        self._n_dropped = 0

    def fit(self, messages: Sequence[Message], units_of: UnitsOf, reserve: int) -> Fitted:
        """As many of the last messages as leave `reserve` cells of the context free.

        Raises:
            ContextFullError: the last message alone does not fit, with the system prompt.
        """
        room = self._n_ctx - reserve
        units = units_of(messages)
        if n_cells(units) <= room:
            self.forget()
            return Fitted(units)
        head = 1 if messages[0].get("role") == "system" else 0
        starts = [i - head for i in range(head + 1, len(messages)) if messages[i].get("role") == "user"]
        before = self._n_dropped if self._still_dropped(messages, head, units_of) else 0
        tries = [(before, room)] if before else []
        tries += [(n, int(room * _KEEP_SHARE)) for n in starts if n > before]
        tries += [(n, room) for n in starts if n > before]
        for n_dropped, goal in tries:
            units = units_of([*messages[:head], *messages[head + n_dropped :]])
            if n_cells(units) <= goal:
                self._n_dropped = n_dropped
                self._dropped = units_of(messages[head : head + n_dropped])
                return Fitted(units, n_dropped, n_dropped - before)
        raise self._too_much(units, reserve)

    def _still_dropped(self, messages: Sequence[Message], head: int, units_of: UnitsOf) -> bool:
        if not 0 < self._n_dropped < len(messages) - head:
            return False
        return units_of(messages[head : head + self._n_dropped]) == self._dropped

    def _too_much(self, units: list[Unit], reserve: int) -> ContextFullError:
        cells, vision = n_cells(units), n_vision_cells(units)
        seen = [unit.span for unit in units if isinstance(unit, VisionUnit)]
        pictures = len(seen)
        room = self._n_ctx - reserve - (cells - vision)
        ways = []
        if not pictures:
            what = f"the message takes {cells} tokens"
            ways.append("shorten it")
        else:
            what = f"{pictures} picture{'s'[: pictures != 1]} of {vision} tokens, {cells} with the text"
            pairs = [span.t if isinstance(span, VisionSpan) else 1 for span in seen]
            fitting = room // sum(pairs) * self._token_pixels  # of a picture, or of a frame
            if fitting > 3 * self._token_pixels:
                ways.append(f"`max_pixels` {fitting} would fit")
            if max(pairs) > 1:
                ways.append("a lower `fps`")
        if cells + reserve <= self._n_trained:
            ways.append(f"a context (`n_ctx`) of {cells + reserve} would do")
        elif not ways:
            ways.append("show fewer pictures")
        hint = ", or ".join(ways)
        message = f"{what}: too much for a context of {self._n_ctx} that leaves {reserve} for the reply"
        return ContextFullError(message, n_tokens=cells, n_ctx=self._n_ctx, hint=hint)
