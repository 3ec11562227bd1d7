"""The bookkeeping of a run: pictures left to do, results, and their safety on disk.

`runner.Runner` captions on this machine, `distributed.RayRunner` on a cluster; both are a `Book`.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Protocol, TypeAlias

from qvl.runtime.caption.activity import Activity
from qvl.runtime.caption.assemble import joined, readable
from qvl.runtime.caption.inputs import Item
from qvl.runtime.caption.record import Record
from qvl.runtime.caption.sidecar import Sidecars, text_of
from qvl.runtime.caption.state import Mode

_RESTORE: Final = 1024  # records of which a crash may have kept the sidecar from being written
Result: TypeAlias = tuple[Item, Record]


class Results(Protocol):
    """Destination of records: `ledger.Ledger`, or `stdout.JsonLines`."""

    mode: Mode
    crashed: bool

    def is_done(self, path: str) -> bool: ...
    def failed(self, path: str) -> bool | None: ...
    def alias(self, path: str) -> str: ...
    def record(self, path: str) -> Record | None: ...
    def with_content(self, sha256: str, prompt: str) -> Record | None: ...
    def recent(self, n: int) -> list[Record]: ...
    def append(self, records: Sequence[Record]) -> None: ...
    def finish(self) -> None: ...


class Stop:
    """A request to end a run: the first finishes the pictures in flight, the second stops at once.

    Attributes:
        raises: a second request raises KeyboardInterrupt where it arrives, for runs that wait on others.
    """

    def __init__(self) -> None:
        self.asked = 0
        self.raises = False

    def request(self, *_: object) -> None:
        """May be called by a signal handler."""
        self.asked += 1
        if self.raises and self.now:
            raise KeyboardInterrupt

    @property
    def soon(self) -> bool:
        return self.asked > 0

    @property
    def now(self) -> bool:
        return self.asked > 1


@dataclass
class Tally:
    """Counts and times of a run.

    Attributes:
        total: pictures asked for; skipped: done before this run; failed_before: skipped with an error.
        renamed: that the results know under another path of the same file.
        copied: captioned by the caption of a picture with the same content.
        seconds: by stage; decode and preprocess are those of their threads.
    """

    total: int = 0
    skipped: int = 0
    failed_before: int = 0
    done: int = 0
    failed: int = 0
    renamed: int = 0
    copied: int = 0
    interrupted: bool = False
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def left(self) -> int:
        return self.total - self.skipped - self.done - self.failed


class Book:
    """Pictures to caption, and the results they go into.

    Attributes:
        tally: grows as the records come.
        activity: what takes long at this moment.
    """

    def __init__(
        self,
        items: Sequence[Item],
        results: Results,
        sidecars: Sidecars | None = None,
        stop: Stop | None = None,
    ) -> None:
        self.results, self.sidecars = results, sidecars
        self.stop = stop or Stop()
        self.activity = Activity()
        self.tally = Tally(total=len(items))
        self.items = self._as_known(items)
        self._clashes = sidecars.clashes(self.items) if sidecars is not None else {}

    def _as_known(self, items: Sequence[Item]) -> Sequence[Item]:
        """The items by the paths that the results have for them: the same file is the same picture."""
        if self.sidecars is not None and self.sidecars.out_dir is not None:
            return items  # where their texts go depends on their paths
        paths = {item.path for item in items}
        known: list[Item] = []
        for item in items:
            path = self.results.alias(item.path)
            is_other = path != item.path and path not in paths
            self.tally.renamed += is_other
            known.append(replace(item, path=path) if is_other else item)
        return known

    def todo(self) -> Iterator[Item]:
        """The pictures without a result, until the user asks to stop."""
        if self.sidecars is not None and self.results.crashed:
            self.sidecars.restore(self.items, self.results.recent(_RESTORE))
        for item in self.items:
            if self.stop.soon:
                return
            if self._is_done(item):
                self.tally.skipped += 1
                self.tally.failed_before += bool(self.results.failed(item.path))
            else:
                yield item

    def _is_done(self, item: Item) -> bool:
        done = self.results.is_done(item.path)
        if self.sidecars is None or self.results.mode != "skip" or item.path in self._clashes:
            return done
        # A text file that was deleted is made again; one that others made is kept.
        if self.results.failed(item.path) or self.sidecars.has(item):
            return True
        return done and self.sidecars.path(item).is_file()  # blank: so the model, or a person, left it

    def refused(self, item: Item) -> Record | None:
        """The error of a picture whose text file belongs to another one, or cannot be read or written."""
        if self.sidecars is None:
            return None
        if item.path in self._clashes:
            reason: str | None = (
                f"its text file, {self.sidecars.path(item)}, is that of {self._clashes[item.path]}"
            )
        else:
            reason = self.sidecars.obstacle(item, joins=self.results.mode in ("append", "prepend"))
        return None if reason is None else Record(item.path, error=f"{item.path}: {reason}")

    def joined(self, item: Item, record: Record) -> Record:
        """The record with the caption that is there, where the user wants both."""
        mode = self.results.mode
        if mode not in ("append", "prepend") or record.failed:
            return record
        old = self._existing(item)
        return record if old is None else joined(readable(old), record, mode)

    def _existing(self, item: Item) -> Record | None:
        """The caption that is there; with its record, if nobody has changed the text file since."""
        record = self.results.record(item.path)
        if self.sidecars is None:
            return record
        text = self.sidecars.read(item)
        if text is None:
            return None
        same = record is not None and not record.failed and text_of(record).rstrip("\r\n") == text
        return replace(record, caption=text) if record is not None and same else Record(item.path, text)

    def keep(self, results: list[Result]) -> Iterator[Record]:
        """Make records durable, then report them."""
        if not results:
            return
        started = time.perf_counter()
        self.results.append([record for _, record in results])
        if self.sidecars is not None:
            for item, record in results:
                self.sidecars.write(item, record)
        self.tally.seconds["write"] += time.perf_counter() - started
        for _, record in results:
            self.tally.failed += record.failed
            self.tally.done += not record.failed
            self.tally.copied += record.same_as is not None
            yield record

    def run(self) -> Iterator[Record]:
        """Yield each record once it is safe on disk.

        Raises:
            OutputError: the disk is full or fails. Cancelled: told to stop at once.
        """
        raise NotImplementedError

    def finish(self) -> None:
        """Close the pass, unless the user has broken it off."""
        self.tally.interrupted = self.stop.soon and self.tally.left > 0
        if not self.tally.interrupted:
            self.results.finish()
