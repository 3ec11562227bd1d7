"""Long calls into C from a thread of their own, so that Ctrl-C and a cancel are heard meanwhile.

Python runs signal handlers in the main thread, between two steps of Python code: while that thread is inside
a C call, Ctrl-C waits for its end. So the call goes to another thread, and the caller only waits for it.

That thread ends with the call. OpenMP gives every thread that starts parallel work a team of its own, for
as long as it lives, and where libgomp counts more threads in teams than there are cores, all of them sleep
at every barrier instead of spinning (libgomp, config/linux/wait.h, `do_spin`). A token has 800 barriers:
with a second team kept, generation ran at three quarters of its speed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from typing import Final

from qvl.runtime.interrupt import held_interrupts

_POLL_SECONDS: Final = 0.05
_SMALL: Final = 16  # a batch of fewer tokens is over before anybody could press Ctrl-C


def run(
    call: Callable[[], int], n_tokens: int, abort: Callable[[], None], cancelled: Callable[[], bool] | None
) -> int:
    """The call's result; a KeyboardInterrupt or a cancel aborts it, and it is over when this returns.

    Args:
        abort: makes the call return soon.
        cancelled: asked every 50 ms.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if n_tokens < _SMALL or (cancelled is None and not in_main):
        with held_interrupts():  # callbacks of the log and of observers run in this thread
            return call()
    with ThreadPoolExecutor(1, "qvl-decode") as thread:
        future = thread.submit(call)
        try:
            return _wait(future, abort, cancelled)
        except BaseException:
            while not future.done():  # a second Ctrl-C must not leave the call running behind our back
                with suppress(KeyboardInterrupt):
                    abort()
                    _wait(future, abort, None)
            raise


def _wait(future: Future[int], abort: Callable[[], None], cancelled: Callable[[], bool] | None) -> int:
    while True:
        try:
            return future.result(_POLL_SECONDS)
        except FutureTimeout:
            if cancelled is not None and cancelled():
                abort()
