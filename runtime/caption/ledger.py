"""The file of results: locked for one run, appended to durably, and the memory of what has been done.

Beside `out.jsonl` lies `out.jsonl.qvl` (`StateFile`), which is locked while a run is on and holds the
settings of the run and the pass it is in.

A record that is done again (`--overwrite`, `--append`, `--retry-errors`) does not replace the earlier one
at once: it is appended, and supersedes it; when the pass is complete the file is rewritten without what
was superseded. So a pass may be interrupted anywhere, and the same command goes on where it stopped:
the pass is the part of the file from the offset at which it began.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from qvl.runtime.atomic import (
    create_temporary,
    put_in_place,
    remove_leftovers,
    sync,
    sync_folder,
    write_error,
)
from qvl.runtime.caption.record import Record
from qvl.runtime.caption.settings import Settings, changes
from qvl.runtime.caption.state import Mode, RunState, StateFile
from qvl.runtime.caption.table import scan, table_for, table_of
from qvl.runtime.errors import OutputError


@dataclass(frozen=True, slots=True)
class _Entry:
    offset: int
    failed: bool


class Ledger:
    """Records of one run and those before it. Use it as a context manager.

    Args:
        path: `.csv` is CSV, anything else JSONL.
        settings: of this run.
        mode: what happens to records that are there already.
        accept_changes: go on although the settings are not those of the records.

    Attributes:
        notes: what the user should hear: a torn line repaired, a pass taken up again.
        crashed: whether the run before this one was killed, or ended with an error.

    Raises:
        OutputError: another run has it open; other settings; no file; it cannot be written.
        FormatError: the file holds something else, or is damaged where no crash could have.
    """

    def __init__(
        self, path: Path, settings: Settings, mode: Mode = "skip", *, accept_changes: bool = False
    ) -> None:
        self.path = path.resolve()
        self.mode = mode
        self.notes: list[str] = []
        self._name = path
        self._table = table_for(path)
        self._latest: dict[str, _Entry] = {}
        self._by_content: dict[bytes, int] = {}
        self._by_place: dict[str, str] | None = None
        self._superseded = False
        self._end = 0
        if path.exists() and not (path.is_file() or path.is_dir()):
            hint = "without -o the records go to stdout"
            raise OutputError(f"{path}: a pipe or a device, expected a file", hint=hint)
        with _naming(path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._beside = StateFile(self.path.with_name(f"{self.path.name}.qvl"), path)
        try:
            remove_leftovers(self.path)
            with _naming(path):
                self._file: BinaryIO = open(self.path, "r+b" if self.path.exists() else "w+b", buffering=0)  # noqa: PTH123, SIM115
            try:
                self._begin(settings, accept_changes)
            except BaseException:
                self._file.close()
                raise
        except BaseException:
            self._beside.close()
            raise

    def _begin(self, settings: Settings, accept_changes: bool) -> None:
        self._state = self._beside.read()
        self.crashed = self._state.running
        with _naming(self._name):
            self._table = table_of(self._name, self._file)
        self._repair()
        is_old = self._table.header != table_for(self._name).header
        if self._state.finishing or (is_old and self._state.pass_mode is None):
            self._compact()
        self._check_settings(settings, accept_changes)
        changed = self._state.settings is None or bool(changes(self._state.settings, settings))
        state = replace(self._state, settings=dict(settings), running=True)
        if self.mode == "skip":
            state = replace(state, pass_mode=None, pass_start=0)
        elif state.pass_mode != self.mode or changed:
            state = replace(state, pass_mode=self.mode, pass_start=self._end)
        else:
            self.notes.append(f"going on with the --{self.mode} that was interrupted")
        self._write_state(state)
        # Only captions of this pass and these settings may stand for another picture of the same content.
        since = self._end if changed else state.pass_start if self.mode != "retry-errors" else 0
        self._by_content = {key: offset for key, offset in self._by_content.items() if offset >= since}

    # what is there ---------------------------------------------------------------------------------

    def failed(self, path: str) -> bool | None:
        """True if the latest record of a picture is an error; None if it has no record."""
        entry = self._latest.get(path)
        return None if entry is None else entry.failed

    def is_done(self, path: str) -> bool:
        """True if this run has nothing left to do for a picture."""
        entry = self._latest.get(path)
        if entry is None or self.mode == "skip":
            return entry is not None
        if entry.offset >= self._state.pass_start:
            return True
        return self.mode == "retry-errors" and not entry.failed

    def alias(self, path: str) -> str:
        """The path under which a picture has its record: `path`, or another one of the same file."""
        if path in self._latest:
            return path
        if self._by_place is None:
            self._by_place = {_place(other): other for other in self._latest}
        return self._by_place.get(_place(path), path)

    def record(self, path: str) -> Record | None:
        """The latest record of a picture, or None."""
        entry = self._latest.get(path)
        return None if entry is None else self._read(entry.offset)

    def with_content(self, sha256: str, prompt: str) -> Record | None:
        """A caption that these settings have given to the same content with the same prompt, or None."""
        offset = self._by_content.get(_content_key(sha256, prompt))
        return None if offset is None else self._read(offset)

    def recent(self, n: int) -> list[Record]:
        """The last records of the file, oldest first."""
        offsets = sorted(entry.offset for entry in self._latest.values())[-n:]
        return [self._read(offset) for offset in offsets]

    def records(self) -> Iterator[Record]:
        """The latest record of every picture, in the order of the file."""
        for offset in sorted(entry.offset for entry in self._latest.values()):
            yield self._read(offset)

    def _read(self, offset: int) -> Record:
        self._file.seek(offset)
        with open(os.dup(self._file.fileno()), "rb") as file:  # noqa: PTH123 buffered, over the same offset
            return self._table.decode(next(self._table.lines(file)))

    # adding ----------------------------------------------------------------------------------------

    def append(self, records: Sequence[Record]) -> None:
        """Write records so that they outlive this process and the machine's power.

        Raises:
            OutputError: the disk is full or fails; the file holds whole records only, and none of these.
        """
        lines = [self._table.encode(record) for record in records]
        start = self._end
        try:
            _write_all(self._file, start, b"".join(lines))
            sync(self._file.fileno())
        except OSError as e:
            with contextlib.suppress(OSError):
                self._file.truncate(start)
            raise _failed(self._name, e, len(self._latest)) from e
        for record, line in zip(records, lines, strict=True):
            self._note(record, start)
            start += len(line)
        self._end = start

    def _note(self, record: Record, offset: int) -> None:
        self._superseded |= record.path in self._latest
        self._latest[record.path] = _Entry(offset, record.failed)
        if not record.failed and record.sha256:
            self._by_content[_content_key(record.sha256, record.prompt or "")] = offset

    # opening and closing ---------------------------------------------------------------------------

    def _repair(self) -> None:
        """Read the file, and cut off the piece of a record that a crash has left at its end."""
        with _naming(self._name):
            size = self._file.seek(0, os.SEEK_END)
            with open(os.dup(self._file.fileno()), "rb") as file:  # noqa: PTH123
                end = 0
                for line in scan(self._name, file, self._table):
                    self._note(line.record, line.start)
                    end = line.end
            header = self._table.header
            if end == 0:
                self._file.truncate(0)
                _write_all(self._file, 0, header)
                end = len(header)
            elif end < size:
                self._file.truncate(end)
            elif not self._ends_with_newline(end):  # an editor took it away
                _write_all(self._file, end, b"\n")
                end = size = end + 1
            if size > end:
                self.notes.append(f"a torn last line ({size - end} bytes) was removed; it is done again")
            sync(self._file.fileno())
            sync_folder(self.path.parent)
        self._end = end

    def _ends_with_newline(self, end: int) -> bool:
        self._file.seek(end - 1)
        return self._file.read(1) == b"\n"

    def _check_settings(self, settings: Settings, accept_changes: bool) -> None:
        state = self._state
        if not self._latest or accept_changes or self.mode in ("overwrite", "append", "prepend"):
            return
        if state.settings is None:
            self.notes.append(f"{self._name}: made with settings that are not known")
            return
        if found := changes(state.settings, settings):
            raise OutputError(
                f"{self._name}: its captions were made with other settings: {'; '.join(found)}",
                hint="`overwrite` makes them anew, `accept_changes` goes on with a mixture, "
                "another `output` begins another file",
            )
        if state.pass_mode not in (None, "retry-errors", self.mode):
            raise OutputError(
                f"{self._name}: some captions are new, some old: {state.pass_mode} was interrupted",
                hint=f"`{state.pass_mode}` continues it, `accept_changes` leaves it so",
            )

    def finish(self) -> None:
        """The pass is complete: leave out what it has superseded."""
        with _naming(self._name):
            if self._superseded:
                self._write_state(replace(self._state, finishing=True))
                self._compact()
            self._write_state(replace(self._state, pass_mode=None, finishing=False))

    def _compact(self) -> None:
        try:
            self._rewrite()
        except OSError as e:
            raise _failed(self._name, e, len(self._latest)) from e
        self._latest.clear()
        self._by_content.clear()
        self._superseded = False
        self._write_state(replace(self._state, pass_mode=None, finishing=False, pass_start=0))
        self._repair()

    def _rewrite(self) -> None:
        """Replace the file by one that holds the latest record of every picture, in all columns."""
        table = table_for(self._name)
        file, temporary = create_temporary(self.path)
        try:
            with file:
                file.write(table.header)
                for record in self.records():
                    file.write(table.encode(record))
                file.flush()
                sync(file.fileno())
            self._file.close()  # Windows replaces no file that is open
            try:
                put_in_place(temporary, self.path)
                self._table = table
            finally:
                self._file = open(self.path, "r+b", buffering=0)  # noqa: PTH123, SIM115
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def close(self, *, clean: bool = True) -> None:
        """Release the file for other runs; what was appended stays whatever happens here.

        Args:
            clean: everything that follows from the records, as sidecars do, has been done.
        """
        with contextlib.suppress(OSError, OutputError):
            self._write_state(replace(self._state, running=not clean))
        self._file.close()
        self._beside.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close(clean=kind is None)

    def _write_state(self, state: RunState) -> None:
        self._state = state
        with _naming(self._name):
            self._beside.write(state)


def _place(path: str) -> str:
    """A picture's absolute path, its folder by its real name."""
    folder, name = os.path.split(path)
    return os.path.join(os.path.realpath(folder or "."), name)  # noqa: PTH118


def _content_key(sha256: str, prompt: str) -> bytes:
    return hashlib.blake2b(f"{sha256}\0{prompt}".encode("utf-8", "surrogateescape"), digest_size=16).digest()


def _write_all(file: BinaryIO, offset: int, data: bytes) -> None:
    """All of data at an offset; a short write, as at the last free block, is continued or fails."""
    view = memoryview(data)
    file.seek(offset)
    while view:
        view = view[file.write(view) or 0 :]


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise _failed(path, e, None) from e


def _failed(path: Path, error: OSError, n_safe: int | None) -> OutputError:
    return write_error(path, error, note="" if n_safe is None else f"; {n_safe} records are safe")
