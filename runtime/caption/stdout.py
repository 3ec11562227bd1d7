"""Records to stdout as JSON lines: no file, so nothing to resume."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final

from qvl.runtime.caption.record import Record
from qvl.runtime.caption.state import Mode

_REMEMBERED: Final = 1024


class JsonLines:
    """Hands each record's line to a callable. It has the methods of `Ledger` that the runner needs.

    Args:
        write: takes a line without its newline.
    """

    mode: Mode = "skip"
    crashed = False

    def __init__(self, write: Callable[[str], None] = lambda line: None) -> None:
        self._write = write
        self._by_content: OrderedDict[tuple[str, str], Record] = OrderedDict()

    def is_done(self, path: str) -> bool:
        return False

    def failed(self, path: str) -> bool | None:
        return None

    def alias(self, path: str) -> str:
        return path

    def record(self, path: str) -> Record | None:
        return None

    def recent(self, n: int) -> list[Record]:
        return []

    def with_content(self, sha256: str, prompt: str) -> Record | None:
        """A recent caption of the same content; only so many are kept, so that memory stays flat."""
        return self._by_content.get((sha256, prompt))

    def append(self, records: Sequence[Record]) -> None:
        for record in records:
            self._write(record.as_json())
            if not record.failed and record.sha256:
                self._by_content[record.sha256, record.prompt or ""] = record
        while len(self._by_content) > _REMEMBERED:
            self._by_content.popitem(last=False)

    def finish(self) -> None:
        pass
