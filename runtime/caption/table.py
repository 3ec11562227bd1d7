"""Records as lines of JSONL or CSV, written at the end of a file and read back after any crash.

A record is one `write`, which ends with a newline. So a crash can leave at most a piece of the last
`write` at the end of the file, or (after a power cut) zeros; `scan` says where the whole records end.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol

from qvl.runtime.caption.record import FIELDS, Record
from qvl.runtime.errors import FormatError
from qvl.runtime.files import parse_json


@dataclass(frozen=True, slots=True)
class Line:
    """A record in a file.

    Attributes:
        start, end: offsets in bytes; the end is after the newline.
    """

    record: Record
    start: int
    end: int


class Table(Protocol):
    """A format of records in a file."""

    header: bytes

    def encode(self, record: Record) -> bytes:
        """The bytes of a record, newline included."""
        ...

    def decode(self, line: bytes) -> Record:
        """The reverse. Raises FormatError or ValueError."""
        ...

    def lines(self, file: BinaryIO) -> Iterator[bytes]:
        """The raw records from where the file stands, the last perhaps torn."""
        ...

    def is_whole(self, line: bytes) -> bool:
        """True if a raw record ends as a record does."""
        ...

    def ends_itself(self, line: bytes) -> bool:
        """True if a raw record without its newline lacks nothing else."""
        ...


class Jsonl:
    """One JSON object a line."""

    header = b""

    def encode(self, record: Record) -> bytes:
        return f"{record.as_json()}\n".encode()

    def decode(self, line: bytes) -> Record:
        values = parse_json(line)
        if not isinstance(values, dict):
            raise FormatError("no JSON object")
        return Record.from_dict(values)

    def lines(self, file: BinaryIO) -> Iterator[bytes]:
        yield from file

    def is_whole(self, line: bytes) -> bool:
        return line.endswith(b"\n")

    def ends_itself(self, line: bytes) -> bool:
        try:  # no beginning of an object is one
            self.decode(line)
        except (ValueError, FormatError, TypeError):
            return False
        return True


class Csv:
    """RFC 4180 with a header; lists as JSON in their cell, nothing for what is not known.

    Args:
        columns: names of `Record`'s fields.
    """

    _NUMBERS: Final = {"prompt_tokens": int, "completion_tokens": int, "seconds": float}
    _LISTS: Final = ("captions", "boxes")

    def __init__(self, columns: Sequence[str] = FIELDS) -> None:
        self.columns = columns
        self.header = ",".join(columns).encode() + b"\n"

    def encode(self, record: Record) -> bytes:
        known = record.as_dict()
        known |= {n: json.dumps(known[n], ensure_ascii=False) for n in self._LISTS if n in known}
        cells = ["" if (value := known.get(name)) is None else _quoted(str(value)) for name in self.columns]
        return (",".join(cells) + "\n").encode("utf-8", "surrogateescape")

    def decode(self, line: bytes) -> Record:
        rows = list(csv.reader(io.StringIO(line.decode("utf-8", "surrogateescape"), newline=""), strict=True))
        if len(rows) != 1 or len(rows[0]) != len(self.columns):
            raise FormatError(f"{len(rows[0]) if rows else 0} fields, expected {len(self.columns)}")
        values: dict[str, Any] = {n: cell for n, cell in zip(self.columns, rows[0], strict=True) if cell}
        values |= {n: kind(values[n]) for n, kind in self._NUMBERS.items() if n in values}
        values |= {n: parse_json(values[n]) for n in self._LISTS if n in values}
        if "error" not in values:
            values.setdefault("caption", "")  # an empty caption is one all the same
        return Record.from_dict(values)

    def lines(self, file: BinaryIO) -> Iterator[bytes]:
        row = b""
        for line in file:  # a newline within quotes does not end a record
            row += line
            if self.is_whole(row):
                yield row
                row = b""
        if row:
            yield row

    def is_whole(self, line: bytes) -> bool:
        return line.endswith(b"\n") and line.count(b'"') % 2 == 0

    def ends_itself(self, line: bytes) -> bool:
        return False  # the last cell may be cut short


def _quoted(text: str) -> str:
    """A cell; the csv module of Python 3.11 leaves a lone carriage return unquoted."""
    return '"' + text.replace('"', '""') + '"' if any(c in text for c in ',"\r\n') else text


def table_for(path: Path) -> Table:
    """The table that a file's name asks for: CSV for `.csv`, otherwise JSONL."""
    return Csv() if path.suffix.lower() == ".csv" else Jsonl()


def table_of(path: Path, file: BinaryIO) -> Table:
    """The table that a file has: a CSV of an earlier version lacks columns that were added since."""
    table = table_for(path)
    if isinstance(table, Csv):
        file.seek(0)
        head = file.readline().removeprefix(codecs.BOM_UTF8)
        columns = head.rstrip(b"\r\n").decode("utf-8", "replace").split(",")
        known = len(set(columns)) == len(columns) and {"path", "caption"} <= set(columns) <= set(FIELDS)
        if head.endswith(b"\n") and known:
            return Csv(columns)
    return table


def scan(path: Path, file: BinaryIO, table: Table) -> Iterator[Line]:
    """The whole records of a file, from its beginning; a torn end is left out.

    Raises:
        FormatError: a record in the middle is damaged, or the file is something else. No crash of ours
            leaves that behind, so nothing is touched.
    """
    file.seek(0)
    head = file.readline() if table.header else file.read(len(codecs.BOM_UTF8))
    bare = head.removeprefix(codecs.BOM_UTF8)  # as editors and spreadsheets put it there
    if table.header:
        if bare.rstrip(b"\r\n") != table.header.rstrip(b"\n"):
            if table.header.startswith(bare.rstrip(b"\0")):  # torn while the file was begun
                return
            raise FormatError(
                f"{path}: the header is not that of captions", hint="choose another name with -o"
            )
        offset = len(head)
    else:
        offset = len(head) - len(bare)
        file.seek(offset)
    torn = 0
    for number, line in enumerate(table.lines(file), 1):
        start, offset = offset, offset + len(line)
        if torn:
            raise _damaged(path, torn, "is cut short, yet others follow it")
        if not table.is_whole(line) and table.ends_itself(line):
            yield Line(table.decode(line), start, offset)  # an editor took the newline away
            continue
        if not table.is_whole(line) or b"\0" in line:
            torn = number
            continue
        if not line.strip():
            continue
        try:
            record = table.decode(line)
        except (ValueError, FormatError, csv.Error, TypeError) as e:
            raise _damaged(path, number, f"cannot be read: {e}") from e
        yield Line(record, start, offset)


def _damaged(path: Path, number: int, what: str) -> FormatError:
    hint = "qvl itself never leaves this: correct or remove the record, or choose another name with -o"
    return FormatError(f"{path}: record {number} {what}", hint=hint)
