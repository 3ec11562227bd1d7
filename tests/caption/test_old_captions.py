"""Captions that are there: nothing that a person wrote is harmed or passed over."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.caption_fakes import write_pictures

from qvl.runtime.caption.bookkeeping import Book
from qvl.runtime.caption.inputs import Item
from qvl.runtime.caption.ledger import Ledger
from qvl.runtime.caption.record import Record
from qvl.runtime.caption.sidecar import Sidecars
from qvl.runtime.caption.table import Csv
from qvl.runtime.errors import InputError

OLD = "old tag, it’s ü"


@pytest.fixture
def item(tmp_path: Path) -> Item:
    (tmp_path / "a.png").write_bytes(b"x")
    return Item(str(tmp_path / "a.png"), str(tmp_path))


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b"\n\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_texts_in_utf8_are_read_without_their_mark(item: Item, encoding: str, end: bytes) -> None:
    Path(item.path).with_suffix(".txt").write_bytes(OLD.encode(encoding) + end)
    assert Sidecars().read(item) == OLD
    assert Sidecars().has(item)
    assert Sidecars().obstacle(item, joins=True) is None


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "cp1252", "latin-1", "shift-jis"])
def test_texts_in_other_encodings_are_left_as_they_are(item: Item, encoding: str) -> None:
    data = {"shift-jis": "写真"}.get(encoding, "old tag ü").encode(encoding)
    path = Path(item.path).with_suffix(".txt")
    path.write_bytes(data)
    sidecars = Sidecars()
    if encoding == "utf-16-le":
        assert sidecars.obstacle(item, joins=True) is not None or b"\0" in data
        return
    with pytest.raises(InputError, match=r"a\.txt: (UTF-16|no text in UTF-8)"):
        sidecars.read(item)
    assert sidecars.has(item)  # so a plain run keeps it
    assert "save it in UTF-8" in (sidecars.obstacle(item, joins=True) or "")
    assert sidecars.obstacle(item, joins=False) is None  # --overwrite may
    assert path.read_bytes() == data


@pytest.mark.parametrize("data", [b"", b"\n", b"   \n", b"\r\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf \n"])
def test_a_blank_file_is_no_caption(item: Item, data: bytes) -> None:
    Path(item.path).with_suffix(".txt").write_bytes(data)
    assert Sidecars().read(item) is None and not Sidecars().has(item)


def test_a_folder_of_that_name_is_an_error_of_its_picture(item: Item) -> None:
    Path(item.path).with_suffix(".txt").mkdir()
    assert not Sidecars().has(item)
    assert "is a folder" in (Sidecars().obstacle(item, joins=False) or "")


@pytest.mark.skipif(os.name == "nt", reason="Windows counts letters")
@pytest.mark.parametrize("suffix", [".caption", ".longer-than-png"])
def test_a_name_too_long_is_an_error_of_its_picture(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / ("ä" * 124 + "abc.png")
    path.write_bytes(b"x")
    sidecars = Sidecars(suffix)
    assert not sidecars.has(Item(str(path)))
    assert "more than 255 bytes" in (sidecars.obstacle(Item(str(path)), joins=False) or "")


def records(*paths: str) -> list[Record]:
    return [Record(path, caption=f'says "{path}", and\nmore', sha256=path) for path in paths]


@pytest.mark.parametrize("saved", ["crlf", "bom", "both"])
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_results_saved_by_a_spreadsheet_or_an_editor_go_on(tmp_path: Path, saved: str, suffix: str) -> None:
    path = tmp_path / f"o.{suffix}"
    with Ledger(path, {}) as ledger:
        ledger.append([Record("a", caption="one"), Record("b", caption="two")])
    data = path.read_bytes()
    if saved in ("crlf", "both"):
        data = data.replace(b"\n", b"\r\n")
    if saved in ("bom", "both"):
        data = b"\xef\xbb\xbf" + data
    path.write_bytes(data)
    with Ledger(path, {}) as ledger:
        assert not ledger.notes
        assert ledger.is_done("a") and ledger.is_done("b") and not ledger.is_done("c")
        ledger.append([Record("c", caption="three")])
    with Ledger(path, {}) as ledger:
        assert [record.caption for record in ledger.records()] == ["one", "two", "three"]


def test_another_header_is_still_refused(tmp_path: Path) -> None:
    path = tmp_path / "o.csv"
    path.write_bytes(Csv().header.replace(b",", b";") + b"a;b\n")
    with pytest.raises(Exception, match="the header is not that of captions"):
        Ledger(path, {})
    assert path.read_bytes().startswith(b"path;")


def test_a_last_line_without_its_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "o.jsonl"
    with Ledger(path, {}) as ledger:
        ledger.append(records("a", "b"))
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    with Ledger(path, {}) as ledger:
        assert not ledger.notes and ledger.is_done("b")
        ledger.append(records("c"))
    with Ledger(path, {}) as ledger:
        assert [record.path for record in ledger.records()] == ["a", "b", "c"]


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_torn_last_line_is_still_removed(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "o.jsonl"
    with Ledger(path, {}) as ledger:
        ledger.append(records("a", "b"))
    path.write_bytes(path.read_bytes()[: -1 - cut])
    with Ledger(path, {}) as ledger:
        assert len(ledger.notes) == 1 and ledger.is_done("a") and not ledger.is_done("b")


def test_the_same_files_by_another_path_are_the_same_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "d", 3)
    items = [Item(f"d/{path.name}", "d") for path in sorted((tmp_path / "d").iterdir())]
    with Ledger(Path("o.jsonl"), {}) as ledger:
        ledger.append([Record(item.path, caption="x") for item in items])
    for root in (str(tmp_path / "d"), "../" + tmp_path.name + "/d"):
        again = [Item(f"{root}/{Path(item.path).name}", root) for item in items]
        with Ledger(Path("o.jsonl"), {}) as ledger:
            assert [ledger.alias(item.path) for item in again] == [item.path for item in items]
            assert ledger.alias("d/other.png") == "d/other.png"


def test_a_run_says_how_many_it_knows_by_another_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.chdir(tmp_path)
    with Ledger(Path("o.jsonl"), {}) as ledger:
        ledger.append([Record("d/a.png", caption="x")])
        book = Book([Item(str(tmp_path / "d/a.png")), Item("d/b.png")], ledger)
        assert book.tally.renamed == 1
        assert [item.path for item in book.todo()] == ["d/b.png"]
        mirrored = Book([Item(str(tmp_path / "d/a.png"))], ledger, Sidecars(out_dir=tmp_path / "out"))
        assert mirrored.tally.renamed == 0  # where its text goes depends on its path
