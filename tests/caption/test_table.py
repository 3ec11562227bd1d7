from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvl.runtime.caption.record import Record
from qvl.runtime.caption.table import Csv, Jsonl, Table, scan
from qvl.runtime.errors import FormatError

TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
# As the system gives them: any bytes but NUL, decoded together (apart, they may make a name that no file has)
NAMES = st.tuples(TEXT, st.binary(max_size=3)).map(
    lambda parts: (
        (parts[0].encode() + parts[1].replace(b"\0", b"")).decode("utf-8", "surrogateescape") or "a.png"
    )
)
RECORDS = st.builds(
    Record,
    path=NAMES,
    caption=TEXT,
    captions=st.lists(TEXT, max_size=2).map(tuple),
    prompt=st.none() | TEXT.filter(bool),
    completion_tokens=st.none() | st.integers(0, 9999),
    seconds=st.none() | st.floats(0, 1e6, allow_nan=False),
    boxes=st.just(()) | st.just(({"label": 'a, "b"', "box": [1, 2, 3, 4]},)),
    raw=st.none() | TEXT.filter(bool),
) | st.builds(Record, path=NAMES, error=TEXT.filter(bool), sha256=st.just("ab" * 32))
TABLES = st.sampled_from([Jsonl(), Csv()])


def read(table: Table, content: bytes) -> list[Record]:
    return [line.record for line in scan(Path("out"), io.BytesIO(content), table)]


@given(TABLES, st.lists(RECORDS, max_size=4))
def test_records_come_back_as_they_were(table: Table, records: list[Record]) -> None:
    content = table.header + b"".join(map(table.encode, records))
    assert read(table, content) == records


@settings(max_examples=60)
@given(TABLES, st.lists(RECORDS, min_size=1, max_size=3), st.data())
def test_a_file_torn_anywhere_gives_its_whole_records(
    table: Table, records: list[Record], data: st.DataObject
) -> None:
    encoded = [table.encode(record) for record in records]
    content = table.header + b"".join(encoded)
    cut = data.draw(st.integers(0, len(content)))
    ends = [len(table.header) + sum(map(len, encoded[: i + 1])) for i in range(len(encoded))]
    assert read(table, content[:cut]) == records[: sum(end <= cut for end in ends)]


@given(TABLES, RECORDS)
def test_the_zeros_of_a_power_cut_are_a_torn_end(table: Table, record: Record) -> None:
    assert read(table, table.header + table.encode(record) + bytes(100)) == [record]
    for length in range(len(table.header)):  # while the file was begun
        assert read(table, table.header[:length] + bytes(40)) == []


@pytest.mark.parametrize("table", [Jsonl(), Csv()])
def test_damage_in_the_middle_is_named(table: Table) -> None:
    one = table.encode(Record("a.png", "a cat"))
    for bad in (b"mended by hand\n", b"[1, 2]\n", b'{"caption": "x"}\n', b"\0\0\n"):
        with pytest.raises(FormatError, match="out: record 2 "):
            read(table, table.header + one + bad + one)


def test_other_files_are_refused() -> None:
    with pytest.raises(FormatError, match="record 1 cannot be read"):
        read(Jsonl(), b"# Readme\n")
    with pytest.raises(FormatError, match="the header is not that of captions"):
        read(Csv(), b"name,age\nx,1\n")


def test_names_that_are_no_utf8_give_valid_json() -> None:
    name = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    line = Jsonl().encode(Record(name, "é"))
    line.decode("utf-8")
    assert Jsonl().decode(line).path == name
    assert "é" in Jsonl().encode(Record("a.png", "é")).decode()


def test_fields_that_users_add_do_no_harm() -> None:
    assert Jsonl().decode(b'{"path": "a.png", "caption": "x", "rating": 5}') == Record("a.png", "x")
