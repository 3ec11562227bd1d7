"""Turns of threads: one at a time does a step, the others wait for its end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """The thread that steps."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._taken = False

    @contextmanager
    def next(self) -> Iterator[bool]:
        """True for the thread whose turn it is; others wait for the end of that turn, and get False."""
        with self._changed:
            mine = not self._taken
            if mine:
                self._taken = True
            else:
                self._changed.wait()
        try:
            yield mine
        finally:
            if mine:
                self._end()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until nobody has a turn, and take it."""
        with self._changed:
            while self._taken:
                self._changed.wait()
            self._taken = True
        try:
            yield
        finally:
            self._end()

    def _end(self) -> None:
        with self._changed:
            self._taken = False
            self._changed.notify_all()
