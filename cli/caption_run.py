"""A captioning run on the command line: where the records go, what is said meanwhile, how it ends."""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qvl.cli.engine import open_model
from qvl.cli.options import ModelOptions
from qvl.cli.output import Output, human_rate, human_seconds
from qvl.runtime.caption.activity import Activity
from qvl.runtime.caption.bookkeeping import Book, Results, Stop, Tally
from qvl.runtime.caption.inputs import Item
from qvl.runtime.caption.ledger import Ledger
from qvl.runtime.caption.options import CaptionOptions
from qvl.runtime.caption.record import Record
from qvl.runtime.caption.sidecar import Sidecars, ledger_path
from qvl.runtime.caption.state import Mode
from qvl.runtime.caption.stdout import JsonLines
from qvl.runtime.errors import Cancelled, InputError
from qvl.runtime.find import find_model

_LINE_SECONDS: Final = 60.0
_INTERRUPTED: Final = 130


@dataclass(frozen=True)
class Destination:
    """Destination of captions.

    Attributes:
        output: a file; None is stdout, unless there are sidecars.
        out_dir: for sidecars, None is beside the pictures.
        suffix: of sidecars; None is no sidecars.
        json: JSON lines on a terminal too.
    """

    output: Path | None
    out_dir: Path | None
    suffix: str | None
    mode: Mode
    accept_changes: bool
    json: bool = False

    @property
    def sidecars(self) -> Sidecars | None:
        return Sidecars(self.suffix, self.out_dir) if self.suffix is not None else None


@dataclass(frozen=True)
class CaptionRun:
    """One call of `qvl caption`."""

    items: Sequence[Item]
    options: CaptionOptions
    destination: Destination
    out: Output
    parallel: int | None = None
    n_ctx: int | None = None

    def here(self, model: ModelOptions) -> int:
        """Caption on this machine; the exit code."""
        from qvl.runtime.caption.setup import open_run

        with ExitStack() as stack:
            results = stack.enter_context(self._results(model))
            loaded = stack.enter_context(open_model(model, self.out, optimize="prefill"))
            runner, captioner = open_run(
                loaded,
                self.items,
                self.options,
                results,
                parallel=self.parallel,
                n_ctx=self.n_ctx,
                sidecars=self.destination.sidecars,
            )
            stack.enter_context(captioner)
            code = self._drive(runner)
            for stage, seconds in (runner.tally.seconds | captioner.seconds).items():
                self.out.detail(f"{stage}: {human_seconds(seconds)}")
            return code

    def on_ray(self, model: ModelOptions, address: str | None, actors: int | None) -> int:
        """Caption on a Ray cluster; the exit code."""
        from qvl.runtime.caption.distributed import RayRunner

        files = find_model(model.path, model.mmproj)
        with self._results(model) as results:
            options = {name: value for name, value in model.kwargs().items() if name != "mmproj"}
            return self._drive(
                RayRunner(
                    self.items,
                    self.options,
                    results,
                    files,
                    address=address,
                    actors=actors,
                    load_options=options,
                    parallel=self.parallel,
                    n_ctx=self.n_ctx,
                    sidecars=self.destination.sidecars,
                )
            )

    @contextmanager
    def _results(self, model: ModelOptions) -> Iterator[Results]:
        """The file of results, locked and repaired, or stdout."""
        to, sidecars = self.destination, self.destination.sidecars
        if to.output is not None and str(to.output) != "-":
            path = to.output
        elif sidecars is not None:
            path = ledger_path(self.items, to.out_dir)
        else:
            if to.mode != "skip":
                hint = f"-o FILE or --sidecar, as in the run before --{to.mode}"
                raise InputError(f"--{to.mode} needs a file of captions", hint=hint)
            yield JsonLines(self._show if sys.stdout.isatty() and not to.json else self.out.line)
            return
        files = find_model(model.path, model.mmproj)
        settings = dict(self.options.settings(files.text, files.mmproj))
        if sidecars is not None:
            settings["sidecar"] = sidecars.suffix
        if model.precision != "auto":
            settings["precision"] = model.precision
        with Ledger(path, settings, to.mode, accept_changes=to.accept_changes) as ledger:
            for note in ledger.notes:
                self.out.note(note)
            yield ledger

    def _show(self, line: str) -> None:
        """A record for people: the path and the caption; errors are on stderr already."""
        record = json.loads(line)
        for text in record.get("captions") or [record["caption"]]:
            if text is not None:
                self.out.page(f"{record['path']}: {text}")

    def _drive(self, book: Book) -> int:
        # A bar would stand in the way of records on the same terminal, which show by themselves how it goes.
        in_the_way = isinstance(book.results, JsonLines) and sys.stdout.isatty()
        has_bar = self.out.shows_bars and not in_the_way
        resumes = not isinstance(book.results, JsonLines)
        report = Report(self.out, book.tally, book.activity, has_bar=has_bar, resumes=resumes)
        shown = self.out.progress("captioning", "pictures", delay=0 if has_bar else math.inf)
        with _interrupts(book.stop, self.out), shown as bar:
            bar(0, book.tally.total, report.label)
            try:
                for record in book.run():
                    report.take(record)
                    bar(report.n_finished, book.tally.total, report.label)
            except (Cancelled, KeyboardInterrupt):
                book.tally.interrupted = True
        self.out.note(report.summary())
        if book.tally.interrupted:
            return _INTERRUPTED
        return 1 if book.tally.failed or book.tally.failed_before else 0


@contextmanager
def _interrupts(stop: Stop, out: Output) -> Iterator[None]:
    """Ctrl-C finishes what is in flight, a second one stops at once; SIGTERM is a Ctrl-C."""

    def handle(number: int, frame: object) -> None:
        if not stop.soon:
            out.note("finishing the pictures under way; press Ctrl-C again to stop at once")
        stop.request()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            # After a Ctrl-C the program is leaving; one that comes late must not cut that short.
            signal.signal(number, signal.SIG_IGN if stop.soon else handler)


class Report:
    """Words about a run: errors as they come, a line a minute where there is no bar, a summary."""

    def __init__(
        self,
        out: Output,
        tally: Tally,
        activity: Activity | None = None,
        *,
        has_bar: bool = False,
        resumes: bool = True,
    ) -> None:
        self._out, self._tally, self._activity = out, tally, activity or Activity()
        self._has_bar, self._resumes = has_bar, resumes
        self._started = self._last = time.monotonic()

    @property
    def n_finished(self) -> int:
        return self._tally.skipped + self._tally.done + self._tally.failed

    def take(self, record: Record) -> None:
        if record.error is not None:
            self._out.warn(record.error)
        now = time.monotonic()
        if not self._has_bar and now - self._last >= _LINE_SECONDS:
            self._last = now
            self._out.note(
                f"{self.n_finished} of {self._tally.total}, {self.label()}, {self._time_left()} left"
            )

    def label(self) -> str:
        """The rate, how many failed if any did, and what takes long at this moment."""
        tally = self._tally
        parts = [f"{tally.failed} failed"] if tally.failed else []
        parts += [human_rate(self._rate())] if tally.done + tally.failed else []
        parts += filter(None, [self._activity.words()])
        return ", ".join(parts) or "captioning"

    def _rate(self) -> float:
        seconds = time.monotonic() - self._started
        return 60 * (self._tally.done + self._tally.failed) / max(seconds, 1e-3)

    def _time_left(self) -> str:
        return human_seconds(60 * self._tally.left / max(self._rate(), 1e-9))

    def summary(self) -> str:
        tally = self._tally
        parts = [f"{tally.done} captioned"]
        if tally.copied:
            parts[0] += f" ({tally.copied} copied from identical pictures)"
        if tally.failed:
            parts.append(f"{tally.failed} failed")
        if tally.skipped:
            parts.append(f"{tally.skipped} done before")
        if tally.renamed:
            parts.append(f"{tally.renamed} recorded under another path")
        if tally.failed_before:
            parts.append(f"{tally.failed_before} of them had failed (--retry-errors tries them again)")
        if tally.interrupted:
            resume = "run the same command to resume" if self._resumes else "-o FILE makes a run resumable"
            parts.append(f"interrupted, {tally.left} left; {resume}")
        words = f"{', '.join(parts)}; {human_seconds(time.monotonic() - self._started)}"
        return f"{words}, {human_rate(self._rate())}" if tally.done else words
