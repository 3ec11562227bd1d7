"""The only printer: stdout for what was asked, stderr for everything else.

stdout gets the model's text or JSON, byte for byte, never through markup. stderr gets notes, tables of
a finished command, progress, warnings and errors; colour and bars only on a terminal.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TextIO

from qvl.runtime.errors import QvlError

_RED, _YELLOW, _DIM, _RESET = "\x1b[1;31m", "\x1b[33m", "\x1b[2m", "\x1b[0m"
_UNITS = ("B", "kB", "MB", "GB", "TB")


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


def format_table(rows: Sequence[Sequence[str]], header: Sequence[str] | None = None, indent: int = 0) -> str:
    """Columns of plain text: the first aligned left, the others right, two spaces between."""
    lines = [header, *rows] if header else [*rows]
    n_columns = max(map(len, lines), default=0)
    widths = [max(len(row[i]) for row in lines if i < len(row)) for i in range(n_columns)]
    pad = " " * indent

    def line(row: Sequence[str]) -> str:
        first, *rest = (*row, "")
        cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(rest, widths[1:], strict=False))]
        return (pad + "  ".join(cells)).rstrip()

    return "\n".join(map(line, lines))


class Advance(Protocol):
    """What a task calls as it goes on: how much is done, of how much, and what it is at."""

    def __call__(self, done: float, total: float, label: str = "", /) -> None: ...


@dataclass(frozen=True)
class Output:
    """Where a command's words go.

    Attributes:
        quiet: -q: only errors and warnings reach stderr, and no bars.
        verbose: -v: details too.
    """

    quiet: bool = False
    verbose: bool = False

    # stdout ----------------------------------------------------------------------------------------

    def write(self, text: str) -> None:
        """Send the model's text to stdout as it is, at once."""
        sys.stdout.write(text)
        sys.stdout.flush()

    def line(self, text: str = "") -> None:
        self.write(f"{text}\n")

    def json(self, value: Any, *, indent: int | None = None) -> None:
        """Send one JSON value to stdout, on one line unless indented."""
        self.line(json.dumps(value, ensure_ascii=False, indent=indent))

    # stderr ----------------------------------------------------------------------------------------

    def note(self, text: str = "") -> None:
        """Something the user wants to know: not with -q."""
        if not self.quiet:
            _stderr(text)

    def dim(self, text: str) -> None:
        """A note that should not draw the eye."""
        if not self.quiet:
            _stderr(paint(text, _DIM))

    def detail(self, text: str) -> None:
        """Something only -v asks for."""
        if self.verbose:
            _stderr(paint(text, _DIM))

    def warn(self, text: str) -> None:
        _stderr(f"{paint('warning:', _YELLOW)} {text}")

    def error(self, error: QvlError | str, hint: str | None = None) -> None:
        message, hint = (error.message, error.hint) if isinstance(error, QvlError) else (error, hint)
        _stderr(f"{paint('error:', _RED)} {message}")
        if hint:
            _stderr(f"{paint('hint:', _DIM)} {hint}")
        if os.environ.get("QVL_DEBUG") and sys.exc_info()[0]:
            traceback.print_exc()

    @property
    def shows_bars(self) -> bool:
        return not self.quiet and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    @contextmanager
    def progress(self, label: str, unit: str = "bytes") -> Iterator[Advance]:
        """A bar on stderr while the body runs; gone when it ends, and nothing when stderr is no terminal.

        Args:
            unit: "bytes" counts in MB with a rate; anything else is a plain counter with that name.
        """
        if not self.shows_bars:
            yield lambda done, total, label="", /: None
            return
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            ProgressColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        counters: list[ProgressColumn] = (
            [DownloadColumn(), TransferSpeedColumn()]
            if unit == "bytes"
            else [MofNCompleteColumn(), TextColumn(unit)]
        )
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            *counters,
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console(), transient=True) as bar:
            task = bar.add_task(label, total=None)

            def advance(done: float, total: float, label_now: str = "", /) -> None:
                bar.update(task, completed=done, total=total, description=label_now or label)

            yield advance


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
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def throttled(call: Callable[[str], None], seconds: float = 60.0) -> Callable[[str], None]:
    """The call, let through at most once in so many seconds: progress for a log file."""
    last = time.monotonic()

    def through(text: str) -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            call(text)

    return through
