"""The only printer: stdout for what was asked, stderr for everything else.

stdout gets the model's text or JSON, byte for byte, never through markup. stderr gets notes, tables of
a finished command, progress, warnings and errors; colour and bars only on a terminal.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO

from qvl.cli.hints import with_flags
from qvl.cli.layout import columns, wrapped
from qvl.runtime.errors import QvlError
from qvl.runtime.files import as_json

_RED, _YELLOW, _DIM, _RESET = "\x1b[1;31m", "\x1b[33m", "\x1b[2m", "\x1b[0m"
_NARROW = 60  # columns; a narrower terminal has no room for a bar
_UNITS = ("B", "kB", "MB", "GB", "TB")
# Control characters but for tabs and line breaks, and those that reorder text
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def human_bytes(n: float) -> str:
    """A size with three significant digits and a decimal unit: 1234567 is "1.23 MB"."""
    unit = 0
    while n >= 999.5 and unit < len(_UNITS) - 1:
        n, unit = n / 1000, unit + 1
    digits = 0 if unit == 0 or n >= 99.95 else 1 if n >= 9.995 else 2
    return f"{n:.{digits}f} {_UNITS[unit]}"


def human_seconds(seconds: float) -> str:
    """A duration to be read at a glance: "0.8 s", "42 s", "3 min 05 s", "2 h 10 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def human_rate(a_minute: float) -> str:
    """Format a rate per minute: "2,350 a minute", "4.5 a minute"."""
    digits = 0 if a_minute >= 9.95 else 1
    return f"{a_minute:,.{digits}f}".removesuffix(".0") + " a minute"


def printable(text: str) -> str:
    """The text with control characters escaped (but tabs and line breaks): what a model or a file's name
    says must not steer the terminal.
    """
    return _CONTROL.sub(
        lambda found: f"\\x{ord(found[0]):02x}" if found[0] < "\u0100" else f"\\u{ord(found[0]):04x}", text
    )


def one_line(text: str) -> str:
    """The text printable and on one line: a name with a line break in it must not pose as another message."""
    return printable(text).replace("\n", "\\n")


@dataclass(frozen=True)
class Output:
    """Prints what a command says, to stdout and stderr.

    Attributes:
        quiet: -q: only errors and warnings reach stderr, and no bars.
        verbose: -v: details too.
    """

    quiet: bool = False
    verbose: bool = False

    # stdout ----------------------------------------------------------------------------------------

    def write(self, text: str) -> None:
        """Send the model's text to stdout at once: as it is into a pipe, printable on a terminal."""
        sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()

    def line(self, text: str = "") -> None:
        self.write(f"{text}\n")

    def page(self, text: str) -> None:
        """Send text for people to stdout, wrapped where that is a terminal."""
        self.line(wrapped(text, self.width))

    @property
    def width(self) -> int | None:
        """Columns of the terminal on stdout; None without one."""
        return columns(sys.stdout)

    @property
    def note_width(self) -> int | None:
        """Columns of the terminal on stderr; None without one."""
        return columns(sys.stderr)

    def json(self, value: Any, *, indent: int | None = None) -> None:
        """Send one JSON value to stdout, on one line unless indented."""
        text = as_json(value, indent=indent)
        if sys.stdout.isatty():
            text = _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
        self.line(text)

    # stderr ----------------------------------------------------------------------------------------

    def note(self, text: str = "") -> None:
        """Tell the user something, unless -q is given."""
        if not self.quiet:
            _stderr(printable(text))

    def dim(self, text: str) -> None:
        """Print a note in a faint colour."""
        if not self.quiet:
            _stderr(paint(printable(text), _DIM))

    def answer(self, text: str) -> None:
        """Print what a command in a conversation was asked for, with -q too."""
        _stderr(paint(printable(text), _DIM))

    def detail(self, text: str) -> None:
        """Print a detail, with -v."""
        if self.verbose:
            _stderr(paint(printable(text), _DIM))

    def warn(self, text: str) -> None:
        _stderr(f"{paint('warning:', _YELLOW)} {one_line(with_flags(text))}")

    def error(self, error: QvlError | str, hint: str | None = None) -> None:
        message, hint = (error.message, error.hint) if isinstance(error, QvlError) else (error, hint)
        _stderr(f"{paint('error:', _RED)} {one_line(with_flags(message))}")
        if hint:
            _stderr(f"{paint('hint:', _DIM)} {one_line(with_flags(hint))}")
        if os.environ.get("QVL_DEBUG") and sys.exc_info()[0]:
            traceback.print_exc()

    @property
    def shows_bars(self) -> bool:
        return not self.quiet and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    @contextmanager
    def progress(self, label: str, unit: str = "bytes", delay: float = 0.3) -> Iterator[Bar]:
        """A bar on stderr while the body runs; gone when it ends, and nothing when stderr is no terminal.

        Args:
            unit: "bytes" counts in MB with a rate, "%" shows a share, others are counted by name.
            delay: seconds before it appears, so that what is quick shows none; then it appears even where
                no progress was reported yet.
        """
        bar = Bar(label, unit, delay if self.shows_bars else float("inf"))
        try:
            yield bar
        finally:
            bar.close()


class Bar:
    """A progress bar, drawn from a delay on until it is closed; call it with (done, total, label).

    A label may be a function, which is called whenever the bar is drawn. Any thread may call.
    """

    def __init__(self, label: str, unit: str, delay: float) -> None:
        self._label: str | Callable[[], str] = label
        self._unit = unit
        self._from = time.monotonic() + delay
        self._at: tuple[float, float | None] = 0.0, None
        self._bar: Any = None
        self._task: Any = None
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        if delay == 0:
            self._draw()
        elif delay < float("inf"):
            self._timer = threading.Timer(delay, self._draw)
            self._timer.daemon = True
            self._timer.start()

    def __call__(self, done: float, total: float, label: str | Callable[[], str] = "", /) -> None:
        self._at, self._label = (done, total), label or self._label
        if time.monotonic() >= self._from:
            self._draw()

    def _draw(self) -> None:
        with self._lock:
            if self._from == float("inf"):
                return
            (done, total), label = self._at, self._label
            if self._bar is None:
                self._bar = _rich_bar(self._unit)
                self._task = self._bar.add_task(label, total=total, completed=done)
                self._bar.start()
            else:
                self._bar.update(self._task, completed=done, total=total, description=label)

    def close(self) -> None:
        """Take the bar off the screen. It does not come back."""
        if self._timer is not None:
            self._timer.cancel()
        with self._lock:
            bar, self._bar, self._from = self._bar, None, float("inf")
        if bar is not None:
            bar.stop()


def _rich_bar(unit: str) -> Any:
    from rich import progress
    from rich.table import Column
    from rich.text import Text

    class Label(progress.ProgressColumn):
        def render(self, task: progress.Task) -> Text:
            label: Any = task.description
            return Text(one_line(label() if callable(label) else label))

    counters: dict[str, list[progress.ProgressColumn]] = {
        "bytes": [progress.DownloadColumn(), progress.TransferSpeedColumn()],
        "%": [progress.TaskProgressColumn()],
    }
    named: list[progress.ProgressColumn] = [progress.MofNCompleteColumn(), progress.TextColumn(unit)]
    label, counter = Label(Column(no_wrap=True, overflow="ellipsis")), counters.get(unit, named)
    shown = [label, progress.BarColumn(), *counter, progress.TimeRemainingColumn()]
    if (columns(sys.stderr) or _NARROW) < _NARROW:
        shown = [label, counter[0]]
    # stdout is not to go through a bar, which would wrap it and send it to stderr
    return progress.Progress(*shown, console=console(), transient=True, redirect_stdout=False)


def console() -> Any:
    """rich's console on stderr; it honours NO_COLOR itself."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def paint(text: str, colour: str, stream: TextIO | None = None) -> str:
    """The text in a colour where the stream (stderr) is a terminal and NO_COLOR is not set."""
    stream = stream or sys.stderr
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty()
    return text if plain else f"{colour}{text}{_RESET}"


def _stderr(text: str) -> None:
    sys.stderr.write(f"{wrapped(text, columns(sys.stderr))}\n")
    sys.stderr.flush()
