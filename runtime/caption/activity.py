"""Thread-safe progress of long-running work, for a status line."""

from __future__ import annotations

import threading


class Activity:
    """Work under way by name, with the fraction of it that is done.

    Attributes:
        closed: whoever works is asked to stop.
    """

    def __init__(self) -> None:
        self._shares: dict[str, float] = {}
        self._lock = threading.Lock()
        self.closed = False

    def at(self, what: str, share: float) -> bool:
        """Say how far something is, 1 at its end; False if it should stop."""
        with self._lock:
            if share < 1:
                self._shares[what] = share
            else:
                self._shares.pop(what, None)
        return not self.closed

    def over(self, what: str) -> None:
        """Say that something has ended, whichever way."""
        self.at(what, 1.0)

    def words(self) -> str:
        """The work begun last, as in "reading clip.mp4 45%"; empty when there is none."""
        with self._lock:
            if not self._shares:
                return ""
            what, share = next(reversed(self._shares.items()))
        return f"{what} {share:.0%}"
