"""Work that goes on while the user types."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qvl.runtime.errors import Cancelled

if TYPE_CHECKING:
    from qvl.runtime.engine.reply import StageProgress


class Background:
    """Work in a thread, which can be cancelled or waited for."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._cancel = threading.Event()
        self._error: Exception | None = None
        self._progress: StageProgress | None = None

    def start(self, work: Callable[[threading.Event, StageProgress], Any]) -> None:
        """Begin; earlier work is cancelled first."""
        self.cancel()
        self._cancel, self._error, self._progress = threading.Event(), None, None
        cancel = self._cancel

        def run() -> None:
            try:
                work(cancel, self._report)
            except Cancelled:
                return
            except Exception as e:
                self._error = e

        self._thread = threading.Thread(target=run, name="look-ahead", daemon=True)
        self._thread.start()

    def _report(self, stage: str, fraction: float) -> None:
        if self._progress is not None:
            self._progress(stage, fraction)

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def cancel(self) -> None:
        """Cancel it and wait until it has stopped."""
        self._cancel.set()
        self._join()
        self._error = None

    def wait(self, progress: StageProgress | None = None) -> None:
        """Wait for the end, and show its progress meanwhile.

        Raises:
            Exception: what the work has raised.
        """
        self._progress = progress
        self._join()
        error, self._error = self._error, None
        if error:
            raise error

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
