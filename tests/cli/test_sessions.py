"""Saved conversations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qvl.cli.chat.sessions import LAST, Saved, load, save, session_path
from qvl.runtime.errors import FormatError, InputError, OutputError


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "qvl"


def conversation(picture: Path) -> Saved:
    question = [{"type": "image", "image": str(picture)}, {"type": "text", "text": "Was ist das? 这是什么?"}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "Ein Rad."}]
    return Saved(messages, system="Be brief.", model="m.gguf", settings={"temperature": 0.5})


def test_what_is_saved_comes_back(tmp_path: Path, state: Path) -> None:
    picture = tmp_path / "a.png"
    picture.touch()
    saved = conversation(picture)
    assert save(LAST, saved) == state / "sessions" / "last.json"
    assert load(LAST) == saved
    assert save(str(tmp_path / "mine.json"), saved).exists()
    assert load(str(tmp_path / "mine.json")) == saved


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    picture = tmp_path / b"caf\xe9.png".decode("utf-8", "surrogateescape")
    picture.touch()
    save("talk", conversation(picture))
    assert load("talk") == conversation(picture)


def test_a_person_can_read_it(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    text = save("talk", conversation(tmp_path / "a.png")).read_text(encoding="utf-8")
    assert "Was ist das? 这是什么?" in text
    assert len(text.splitlines()) > 15


def test_a_picture_that_is_gone_is_named(tmp_path: Path) -> None:
    save("talk", conversation(tmp_path / "gone.png"))
    with pytest.raises(InputError, match=r"gone\.png"):
        load("talk")


def test_an_unknown_name_lists_the_known(tmp_path: Path) -> None:
    save("monday", Saved([]))
    with pytest.raises(InputError) as e:
        load("tuesday")
    assert "monday" in str(e.value.hint)


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        "[]",
        '{"qvl_session": 2, "messages": []}',
        '{"qvl_session": 1}',
        '{"qvl_session": 1, "messages": [{"role": "tool", "content": "x"}]}',
        '{"qvl_session": 1, "messages": [{"role": "user", "content": [{"type": "image"}]}]}',
        '{"qvl_session": 1, "messages": [], "system": 3}',
    ],
)
def test_a_damaged_file_is_refused(content: str) -> None:
    path = session_path("bad")
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(FormatError, match=r"bad\.json"):
        load("bad")


def test_saving_leaves_no_other_file(tmp_path: Path) -> None:
    path = save("talk", Saved([]))
    save("talk", Saved([{"role": "user", "content": "hi"}]))
    assert [p.name for p in path.parent.iterdir()] == ["talk.json"]
    assert json.loads(path.read_text())["messages"][0]["content"] == "hi"


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file"):
        save(str(tmp_path / "file" / "x.json"), Saved([]))
