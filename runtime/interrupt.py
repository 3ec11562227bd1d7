"""Ctrl-C while C code calls back into Python.

Python raises KeyboardInterrupt wherever the main thread runs Python code next; in a callback from C it is
printed and lost, and C goes on with whatever the callback has not returned. So while such a call runs, a
SIGINT is only noted, for the callback to ask about, and raised when the call is over.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def held_interrupts() -> Iterator[Callable[[], bool]]:
    """Hold back KeyboardInterrupt while the body runs; yields a function that says whether one is waiting.

    Outside the main thread, and where a program has a SIGINT handler of its own, nothing is changed.

    Raises:
        KeyboardInterrupt: at the end, if Ctrl-C was pressed, in place of what the body raises.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False
        return
    pressed = False

    def note(*_: Any) -> None:
        nonlocal pressed
        pressed = True

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if pressed:
            raise KeyboardInterrupt
