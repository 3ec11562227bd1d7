"""Bounds the pixels that all threads together have decoded at a time."""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType
from typing import Final, Self

MOST: Final = 1 << 25  # pixels: 100 MB in RGB, up to four times that while samples of 16 bits are scaled


class Budget:
    """Pixels that threads may hold together; who asks first is served first.

    Args:
        most: pixels; a picture of more has them all to itself.
    """

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._held = 0
        self._queue: deque[object] = deque()
        self._changed = threading.Condition()

    def take(self, n_pixels: int) -> None:
        """Wait until so many fit."""
        turn = object()
        with self._changed:
            self._queue.append(turn)
            try:
                self._changed.wait_for(
                    lambda: self._queue[0] is turn and (not self._held or self._held + n_pixels <= self._most)
                )
                self._held += n_pixels
            finally:
                self._queue.remove(turn)
                self._changed.notify_all()

    def give_back(self, n_pixels: int) -> None:
        """Let others have what `take` took."""
        with self._changed:
            self._held -= n_pixels
            self._changed.notify_all()


class Turn:
    """A share of the budget, held by one picture until the end of the block."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._held = 0

    def wait(self, n_pixels: int) -> None:
        """Take a picture's pixels from the budget, once."""
        if not self._held:
            self._budget.take(n_pixels)
            self._held = n_pixels

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._held:
            self._budget.give_back(self._held)
