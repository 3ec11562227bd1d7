"""Long calls into C from a thread of their own, so that Ctrl-C and a cancel are heard meanwhile.

Python runs signal handlers in the main thread, between two steps of Python code: while that thread is inside
a C call, Ctrl-C waits for its end. So the call goes to a worker, and the caller only waits for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from typing import Final

_POLL_SECONDS: Final = 0.05
_SMALL: Final = 16  # a batch of fewer tokens is over before anybody could press Ctrl-C


class Worker:
    """Runs one call at a time.

    Args:
        abort: makes the call that is running return soon.
    """

    def __init__(self, abort: Callable[[], None]) -> None:
        self._abort = abort
        self._executor: ThreadPoolExecutor | None = None

    def run(self, call: Callable[[], int], n_tokens: int, cancelled: Callable[[], bool] | None) -> int:
        """The call's result; a KeyboardInterrupt or a cancel aborts it, and it is over when this returns."""
        in_main = threading.current_thread() is threading.main_thread()
        if n_tokens < _SMALL or (cancelled is None and not in_main):
            return call()
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, "qvl-decode")
        future = self._executor.submit(call)
        try:
            return self._wait(future, cancelled)
        except BaseException:
            while not future.done():  # a second Ctrl-C must not leave the call running behind our back
                with suppress(KeyboardInterrupt):
                    self._abort()
                    self._wait(future, None)
            raise

    def _wait(self, future: Future[int], cancelled: Callable[[], bool] | None) -> int:
        while True:
            try:
                return future.result(_POLL_SECONDS)
            except FutureTimeout:
                if cancelled is not None and cancelled():
                    self._abort()

    def close(self) -> None:
        """End the thread."""
        if self._executor is not None:
            self._executor.shutdown(wait=True)
