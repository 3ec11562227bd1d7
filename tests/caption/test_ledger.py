from __future__ import annotations

import json
from pathlib import Path

import pytest

from qvl.runtime.caption.ledger import Ledger
from qvl.runtime.caption.record import Record
from qvl.runtime.caption.state import Mode
from qvl.runtime.errors import FormatError, OutputError

SETTINGS = {"model": "m.gguf (1)", "prompt": "Describe.", "temp": 0.0}
A, B = Record("a.png", "a cat", sha256="aa", prompt="p"), Record("b.png", "a dog", sha256="bb", prompt="p")
BROKEN = Record("c.png", error="c.png: cut short")


@pytest.fixture(params=["out.jsonl", "out.csv"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / str(request.param)


def filled(out: Path, *records: Record, mode: Mode = "skip", finish: bool = True) -> None:
    with Ledger(out, SETTINGS, mode) as ledger:
        ledger.append(records)
        if finish:
            ledger.finish()


def content(out: Path) -> list[Record]:
    with Ledger(out, SETTINGS, accept_changes=True) as ledger:
        return list(ledger.records())


def test_what_was_appended_is_there(out: Path) -> None:
    filled(out, A, BROKEN)
    with Ledger(out, SETTINGS) as ledger:
        assert [ledger.is_done(path) for path in ("a.png", "b.png", "c.png")] == [True, False, True]
        assert [ledger.failed(path) for path in ("a.png", "b.png", "c.png")] == [False, None, True]
        assert ledger.record("a.png") == A
        assert ledger.with_content("aa", "p") == A
        assert ledger.with_content("aa", "another prompt") is None
        ledger.append([B])
        assert list(ledger.records()) == [A, BROKEN, B]


@pytest.mark.parametrize("cut", [2, 3, 10])
def test_a_torn_last_line_is_removed_and_said(out: Path, cut: int) -> None:
    filled(out, A, B)
    out.write_bytes(out.read_bytes()[:-cut])
    with Ledger(out, SETTINGS) as ledger:
        assert "torn last line" in ledger.notes[0]
        assert not ledger.is_done("b.png")
        ledger.append([B])
    assert content(out) == [A, B]


def test_a_second_run_is_refused(out: Path) -> None:
    with Ledger(out, SETTINGS), pytest.raises(OutputError, match="another run is writing to it"):
        Ledger(out.parent / "." / out.name, SETTINGS)
    Ledger(out, SETTINGS).close()


def test_changed_settings_are_named(out: Path) -> None:
    filled(out, A)
    changed = {**SETTINGS, "temp": 0.7, "prompt": None}
    before = out.read_bytes()
    with pytest.raises(OutputError, match=r"prompt: 'Describe\.' → not set; temp: 0\.0 → 0\.7"):
        Ledger(out, changed)
    with pytest.raises(OutputError, match="other settings"):
        Ledger(out, changed, "retry-errors")
    assert out.read_bytes() == before
    with Ledger(out, changed, accept_changes=True) as ledger:
        assert ledger.is_done("a.png")
        assert ledger.with_content("aa", "p") is None  # it is a caption of other settings
    Ledger(out, changed).close()  # they are the file's settings now


def test_no_captions_no_settings_to_keep(out: Path) -> None:
    filled(out)
    Ledger(out, {"prompt": "Another."}).close()


@pytest.mark.parametrize("state", ["[1]", '{"settings": 3}', '{"foo": 1}', '{"pass_start": "0"}', '"x"'])
def test_another_file_in_the_place_of_the_one_beside_is_refused(tmp_path: Path, state: str) -> None:
    out = tmp_path / "out.jsonl"
    filled(out, A)
    (tmp_path / "out.jsonl.qvl").write_text(state)
    with pytest.raises(FormatError, match=r"out\.jsonl\.qvl") as caught:
        Ledger(out, SETTINGS)
    assert "remove it" in str(caught.value.hint)
    (tmp_path / "out.jsonl.qvl").unlink()
    assert content(out) == [A]


def test_without_the_file_beside_it_the_settings_are_unknown(out: Path) -> None:
    filled(out, A)
    out.with_name(f"{out.name}.qvl").unlink()
    with Ledger(out, SETTINGS) as ledger:
        assert "settings that are not known" in ledger.notes[0]


def test_a_torn_file_of_settings_falls_back_to_the_line_before(out: Path) -> None:
    filled(out, A)
    beside = out.with_name(f"{out.name}.qvl")
    beside.write_bytes(beside.read_bytes() + b'{"qvl_caption": 1, "sett')
    with pytest.raises(OutputError, match="other settings"):
        Ledger(out, {"prompt": "Another."})
    Ledger(out, SETTINGS).close()
    assert json.loads(beside.read_text().splitlines()[-1])["running"] is False


def test_redone_records_replace_the_old_ones_at_the_end(out: Path) -> None:
    filled(out, A, BROKEN, B)
    new = Record("a.png", "a tabby cat")
    with Ledger(out, {**SETTINGS, "prompt": "More."}, "overwrite") as ledger:
        assert not any(map(ledger.is_done, ("a.png", "b.png", "c.png")))
        assert ledger.with_content("aa", "p") is None
        ledger.append([new])
        assert ledger.is_done("a.png")
        ledger.finish()
        assert list(ledger.records()) == [BROKEN, B, new]
    assert content(out) == [BROKEN, B, new]


def test_errors_are_retried_once(out: Path) -> None:
    filled(out, A, BROKEN)
    with Ledger(out, SETTINGS, "retry-errors") as ledger:
        assert ledger.is_done("a.png")
        assert not ledger.is_done("c.png")
        ledger.append([Record("c.png", error="c.png: still cut short")])
        assert ledger.is_done("c.png")
        ledger.finish()
    assert content(out) == [A, Record("c.png", error="c.png: still cut short")]


@pytest.mark.parametrize("mode", ["overwrite", "append"])
def test_an_interrupted_pass_is_taken_up_where_it_stopped(out: Path, mode: Mode) -> None:
    filled(out, A, B)
    newer, newest = Record("a.png", "1"), Record("b.png", "2")
    filled(out, newer, mode=mode, finish=False)
    with pytest.raises(OutputError, match=f"{mode} was interrupted"):
        Ledger(out, SETTINGS)
    with Ledger(out, SETTINGS, mode) as ledger:
        assert f"--{mode}" in ledger.notes[0]
        assert ledger.is_done("a.png")
        assert not ledger.is_done("b.png")
        ledger.append([newest])
        ledger.finish()
    assert content(out) == [newer, newest]
    with Ledger(out, SETTINGS, mode) as ledger:  # a new command, a new pass
        assert not ledger.is_done("a.png")


def test_other_settings_begin_the_pass_anew(out: Path) -> None:
    filled(out, A)
    filled(out, Record("a.png", "1"), mode="overwrite", finish=False)
    with Ledger(out, {**SETTINGS, "temp": 1.0}, "overwrite") as ledger:
        assert not ledger.is_done("a.png")


def test_a_crash_while_finishing_is_made_good(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(out, A, B)
    with Ledger(out, SETTINGS, "overwrite") as ledger:
        ledger.append([Record("a.png", "1"), Record("b.png", "2")])
        with monkeypatch.context() as patch:
            patch.setattr(Ledger, "_compact", lambda self: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                ledger.finish()
    Ledger(out, SETTINGS).close()
    assert content(out) == [Record("a.png", "1"), Record("b.png", "2")]
    assert out.read_bytes().count(b"a.png") == 1


def test_a_file_that_is_something_else_is_not_touched(tmp_path: Path) -> None:
    for name in ("readme.jsonl", "table.csv"):
        out = tmp_path / name
        out.write_text("name,age\nAda,36\n")
        with pytest.raises(FormatError):
            Ledger(out, SETTINGS)
        assert out.read_text() == "name,age\nAda,36\n"


def test_a_failed_write_leaves_whole_records(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    filled(out, A)
    size = out.stat().st_size
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Ledger(out, SETTINGS) as ledger:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, limit[1]))  # room for a piece of a record
        try:
            with pytest.raises(OutputError, match=r"the disk is full; 1 records are safe") as caught:
                ledger.append([B])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert "run the same command again" in str(caught.value.hint)
        assert out.stat().st_size == size
        ledger.append([B])
    assert content(out) == [A, B]


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        Ledger(tmp_path / "file" / "out.jsonl", SETTINGS)
