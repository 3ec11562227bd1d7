"""Names as lists, shells, Macs, spreadsheets and PowerShell write them."""

from __future__ import annotations

import os
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvl.runtime.caption.inputs import Item, find_inputs
from qvl.runtime.caption.names import by_composition, decode_list, matches, meant, normalized, split_list
from qvl.runtime.caption.prompts import Variables
from qvl.runtime.errors import InputError

NAMES = st.text(st.characters(exclude_characters="\0\r\n", exclude_categories=("Cs",)), min_size=1).filter(
    lambda name: bool(name.strip())
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def touch(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"x")


def found(*arguments: str, stdin: list[str] | None = None) -> list[str]:
    return [item.path for item in find_inputs(arguments, stdin).items]


# Lists


@given(st.lists(NAMES, min_size=1, max_size=20), st.sampled_from(["\n", "\r\n"]))
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_every_encoding_with_a_mark_gives_the_names(encoding: str, names: list[str], ends: str) -> None:
    data = "".join(f"{name}{ends}" for name in names).encode(encoding)
    assert split_list(decode_list(data)) == names


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_without_a_mark(encoding: str) -> None:
    assert split_list(decode_list("a b.png\r\nphotos/c.png\r\n".encode(encoding))) == [
        "a b.png",
        "photos/c.png",
    ]


def test_bytes_that_are_no_utf8_stand_for_themselves() -> None:
    assert os.fsencode(split_list(decode_list(b"caf\xe9.png\n"))[0]) == b"caf\xe9.png"


def test_nul_separates_where_there_is_one() -> None:
    assert split_list(decode_list(b"a\nb.png\0c.png\0")) == ["a\nb.png", "c.png"]
    assert split_list("a.png\rb.png\r") == ["a.png", "b.png"]


def test_damaged_utf16_is_named() -> None:
    Path("l.txt").write_bytes(b"\xff\xfea\0b")
    with pytest.raises(InputError, match=r"l\.txt: UTF-16 that is damaged"):
        find_inputs(["@l.txt"])


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
@pytest.mark.parametrize("odd", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"])
def test_other_separators_of_unicode_may_be_in_a_name(odd: str) -> None:
    touch(f"b{odd}c.png")
    Path("l.txt").write_text(f"b{odd}c.png\n", encoding="utf-8")
    assert found("@l.txt") == found("-", stdin=[f"b{odd}c.png\n"]) == found(".") == [f"b{odd}c.png"]


@pytest.mark.parametrize(
    "line", ['"my one.png"', "'my one.png'", "“my one.png”", "  my one.png  ", "my one.png"]
)
def test_quotes_that_are_in_no_name(line: str) -> None:
    touch("my one.png")
    Path("l.txt").write_text(f"{line}\r\n", encoding="utf-8")
    assert found("@l.txt") == ["my one.png"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_quotes_that_are_in_a_name() -> None:
    touch('"a.png"', "a.png", 'q"b.png')
    assert str(meant('"a.png"')) == '"a.png"'
    assert str(meant(r'"q\"b.png"')) == 'q"b.png'  # ls -Q


def test_a_url_of_a_file(folder: Path) -> None:
    touch("my one é.png")
    assert meant((folder / "my one é.png").as_uri()) == folder / "my one é.png"


# Accents


@pytest.mark.skipif(sys.platform == "darwin", reason="there both forms name one file")
@pytest.mark.parametrize(("there", "asked"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_accents_composed_or_not(there: str, asked: str) -> None:
    name = unicodedata.normalize(there, "ñandú/é à ü.png")
    touch(name)
    wanted = unicodedata.normalize(asked, name)
    Path("l.txt").write_text(f"{wanted}\n", encoding="utf-8")
    assert found("@l.txt") == found(wanted) == found("-", stdin=[wanted]) == [name]
    assert normalized(Path.cwd() / wanted) == Path.cwd() / name


@pytest.mark.skipif(sys.platform == "darwin", reason="there both forms name one file")
def test_accents_that_leave_a_choice() -> None:
    touch("é.png", unicodedata.normalize("NFD", "é.png"))
    assert found("é.png") == ["é.png"]  # exact first
    assert by_composition("\u212b", ["\u00c5", "A\u030a"]) is None  # an angstrom sign: either could be meant


def test_rows_of_a_table_by_composition() -> None:
    Path("v.csv").write_text("file,who\né.png,Ann\n", encoding="utf-8")
    table = Variables.read(Path("v.csv"))
    assert table.row(Path(unicodedata.normalize("NFD", "d/é.png")))["who"] == "Ann"
    with pytest.raises(InputError, match="no row"):
        table.row(Path("e.png"))


# Patterns


def test_what_exists_literally_is_literal() -> None:
    touch("set [x]/a.png", "set x/b.png", "y/[2024] Images/c.png", "y/2/d.png", "q/x[1].png", "q/x1.png")
    assert found("set [x]/*.png") == ["set [x]/a.png"]
    assert found("y/[2024] Images/*") == ["y/[2024] Images/c.png"]
    assert found("*/[2024] Images/*.png") == ["y/[2024] Images/c.png"]
    assert found("q/x[1].png") == ["q/x[1].png"]
    assert found("set [abcx]/*.png") == ["set x/b.png"]


@pytest.mark.parametrize(
    "pattern", ["*.png", "**/*.png", "a/**/*.png", "a/*/c?.png", "a/b*", "**/[bc]*.png", "a/**"]
)
def test_patterns_match_as_pathlib_does(pattern: str, folder: Path) -> None:
    touch("x.png", "a/b.png", "a/b/c1.png", "a/b/d/c2.png", "a/bb/e.png")
    expected = sorted(path.relative_to(folder) for path in folder.glob(pattern))
    assert [path for path in matches(Path(pattern)) if path != Path()] == [p for p in expected if p != Path()]


def test_a_circle_of_links_ends_in_patterns(folder: Path) -> None:
    touch("a/b.png")
    (folder / "a" / "up").symlink_to(folder, target_is_directory=True)
    assert found("**/*.png") == ["a/b.png"]


# What a system keeps beside the pictures


@pytest.mark.parametrize("name", ["@eaDir", "#recycle", "#snapshot", "@Recycle", "$RECYCLE.BIN", "__MACOSX"])
def test_a_systems_own_folders_are_left_out_and_said(name: str) -> None:
    touch("photos/a.png", f"photos/{name}/a.png/SYNOPHOTO_THUMB_XL.jpg", f"photos/b/{name}/c.png")
    seen = find_inputs(["photos"])
    assert [item.path for item in seen.items] == ["photos/a.png"]
    assert f"photos: skipped files of the system: {name}" in seen.notes
    assert found("photos/**/*.*") == ["photos/a.png"]
    assert found(f"photos/{name}") == [f"photos/{name}/a.png/SYNOPHOTO_THUMB_XL.jpg"]  # named itself


# Where mirrored output goes


@pytest.mark.parametrize(
    ("path", "root"),
    [
        ("p/../../x/a.png", "p"),
        ("../a.png", ""),
        ("p/../../../etc/a.png", "p/.."),
        ("p/b/../../../a.png", "p"),
    ],
)
def test_mirrored_output_never_leaves_its_folder(path: str, root: str) -> None:
    below = Item(path, root).below_root
    assert ".." not in below.parts and not below.is_absolute()


def test_a_glob_with_dots_stays_below(folder: Path) -> None:
    touch("in/a/x.png", "out/y.png")
    for item in find_inputs(["in/*/../../out/*.png"]).items:
        assert ".." not in item.below_root.parts
