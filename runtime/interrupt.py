"""Exceptions and Ctrl-C while C code calls back into Python.

ctypes prints and drops what a callback raises, and C goes on with whatever the callback has not returned.
So every callback is wrapped by a `CallbackGuard`, which keeps the exception, tells C to stop, and raises it
when C has returned.

Python raises KeyboardInterrupt wherever the main thread runs Python code next, which may be such a
callback. So while C runs, a SIGINT is only noted, for the callback to ask about, and raised when the call
is over. The same holds for a SIGTERM whose handler raises.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

RAISING: Final[list[Any]] = [signal.default_int_handler]
"""Handlers of SIGINT and SIGTERM that raise; a program adds its own."""


class CallbackGuard:
    """Keeps the exception of a callback until C has returned.

    Attributes:
        failed: a wrapped callback has raised; its result must not be used.
    """

    def __init__(self) -> None:
        self._raised: BaseException | None = None

    @property
    def failed(self) -> bool:
        return self._raised is not None

    def wrap(self, callback: Callable[P, T], stop: Callable[P, T]) -> Callable[P, T]:
        """The callback as C may call it: once it has raised, `stop` answers in its place."""

        def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
            if self._raised is None:
                try:
                    return callback(*args, **kwargs)
                except BaseException as error:
                    self._raised = error
            return stop(*args, **kwargs)

        return guarded

    def reset(self) -> None:
        """Forget the exception of an earlier call."""
        self._raised = None

    def check(self) -> None:
        """Raise the exception of a callback since the last check. Call it when C has returned."""
        raised, self._raised = self._raised, None
        if raised is not None:
            raise raised


@contextmanager
def held_interrupts() -> Iterator[Callable[[], bool]]:
    """Hold back the exception of Ctrl-C while the body runs; yields a function that tells if one waits.

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
