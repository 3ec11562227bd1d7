"""Ctrl-C while C code calls back into Python.

Python raises KeyboardInterrupt wherever the main thread runs Python code next; in a callback from C it is
printed and lost, and C goes on with whatever the callback has not returned. So while such a call runs, a
SIGINT is only noted, for the callback to ask about, and raised when the call is over. So is a SIGTERM, for
which a program has a handler that raises.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

RAISING: Final[list[Any]] = [signal.default_int_handler]
"""Handlers of SIGINT and SIGTERM that raise; a program adds its own."""


@contextmanager
def held_interrupts() -> Iterator[Callable[[], bool]]:
    """Hold back what Ctrl-C raises while the body runs; yields a function that says whether it is waiting.

    Outside the main thread, and where a program's handlers do not raise, nothing is changed.

    Raises:
        KeyboardInterrupt, or what the handler raises: at the end, in place of what the body raises.
    """
    found: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    held = {number: handler for number, handler in found.items() if handler in RAISING}
    if not held or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came: list[int] = []

    def note(number: int, _: Any) -> None:
        came.append(number)

    for number in held:
        signal.signal(number, note)
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
        if came:
            held[came[0]](came[0], None)
