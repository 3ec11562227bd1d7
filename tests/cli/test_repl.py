"""The conversation behind the prompt, with a model that answers by rote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.rote import RoteSession, question

from qvl.cli.chat.repl import Repl
from qvl.runtime.errors import ImageError, InputError


def test_turns_add_up(repl: Repl, session: RoteSession, capsys: pytest.CaptureFixture[str]) -> None:
    repl.handle("first?")
    repl.handle("second?")
    assert capsys.readouterr().out == "reply 1 end\nreply 2 end\n"
    assert session.prompts[-1] == [
        {"role": "user", "content": "first?"},
        {"role": "assistant", "content": "reply 1 end"},
        {"role": "user", "content": "second?"},
    ]


def test_a_picture_goes_into_the_next_message(repl: Repl, session: RoteSession, picture: Path) -> None:
    repl.handle(f"/image {picture}")
    repl.handle("what is it?")
    repl.handle("and now?")
    assert session.prompts[0] == [question(picture, "what is it?")]
    assert session.prompts[1][0] == question(picture, "what is it?")
    assert session.prompts[1][2] == {"role": "user", "content": "and now?"}


def test_a_picture_is_looked_at_before_the_question(repl: Repl, session: RoteSession, picture: Path) -> None:
    repl.handle(f"/image {picture}")
    repl.conversation._eager.wait()
    assert session.looked_at == [[{"role": "user", "content": [{"type": "image", "image": str(picture)}]}]]


def test_a_dropped_path_attaches(repl: Repl, session: RoteSession, picture: Path) -> None:
    repl.handle(f"'{picture}' ")
    assert session.prompts == []
    repl.handle(f"compare with {picture}")
    parts = session.prompts[0][0]["content"]
    assert [p["type"] for p in parts] == ["image", "image", "text"]
    assert parts[2]["text"] == "compare with"


def test_a_path_that_is_not_there_is_an_error(repl: Repl) -> None:
    with pytest.raises(ImageError, match=r"/no/such\.png"):
        repl.handle("/no/such.png what is it?")


def test_a_name_alone_that_is_not_there_is_an_error(repl: Repl, session: RoteSession) -> None:
    with pytest.raises(ImageError, match=r"gone\.png: no such file"):
        repl.handle("gone.png")
    assert session.prompts == []


@pytest.mark.parametrize(
    ("name", "words"), [("gone.png", "no such file"), ("https://a.example/cat.jpg", "a web address")]
)
def test_a_message_about_a_picture_that_is_not_there_is_not_sent(
    repl: Repl, session: RoteSession, picture: Path, capsys: pytest.CaptureFixture[str], name: str, words: str
) -> None:
    repl.handle(f"{picture} What is it?")
    repl.handle(f"/image {picture}")
    n_asked = len(session.prompts)
    with pytest.raises(ImageError, match=f"{words}.*not sent"):
        repl.handle(f"Is {picture.name} like {name}?")
    assert len(session.prompts) == n_asked
    assert [a.path for a in repl.conversation.pending] == [picture]  # what waited still does
    assert repl.reader._draft == f"Is {picture.name} like {name}?"
    capsys.readouterr()
    repl.handle(f" Is {picture.name} like {name}?")  # a space before it: it is meant
    assert len(session.prompts) == n_asked + 1
    assert f"warning: {name}: {words}" in capsys.readouterr().err


def test_a_picture_that_cannot_be_read_leaves_what_waits(
    repl: Repl, session: RoteSession, picture: Path
) -> None:
    repl.handle(f"/image {picture}")
    bad = picture.with_name("bad.png")
    bad.write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"bad\.png"):
        repl.handle(f"compare with {bad}")
    assert [a.path for a in repl.conversation.pending] == [picture] and not session.prompts


def test_detach(repl: Repl, session: RoteSession, picture: Path) -> None:
    other = picture.with_name("my other.png")
    other.write_bytes(picture.read_bytes())
    repl.handle(f"/image {picture} '{other}'")
    repl.handle("/detach my other.png")
    assert [a.path for a in repl.conversation.pending] == [picture]
    with pytest.raises(InputError, match="not attached"):
        repl.handle("/detach other.png")
    repl.handle("/detach")
    repl.handle("first?")
    assert session.prompts == [[{"role": "user", "content": "first?"}]]
    with pytest.raises(InputError, match="nothing is attached"):
        repl.handle("/detach")


def test_a_dropped_file_that_is_no_picture_is_no_question(
    repl: Repl, session: RoteSession, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").touch()
    for line, words in ((f"'{tmp_path}/notes.txt'", "not a picture or video"), (str(tmp_path), "a folder")):
        with pytest.raises(InputError, match=words):
            repl.handle(line)
    assert session.prompts == []


def test_commands_in_capitals(repl: Repl, session: RoteSession, picture: Path) -> None:
    repl.handle(f"/Image {picture}")
    assert [a.path for a in repl.conversation.pending] == [picture]


def test_settings_are_shown(repl: Repl, capsys: pytest.CaptureFixture[str]) -> None:
    repl.handle("/set parameter temp 0")
    assert capsys.readouterr().err.split() == ["temperature", "0.0"]
    repl.handle("/set")
    rows = dict(line.split() for line in capsys.readouterr().err.splitlines())
    assert (rows["temperature"], rows["top_k"], rows["max_tokens"]) == ("0.0", "default", "1024")


def test_text_with_a_slash_is_only_text(repl: Repl, session: RoteSession) -> None:
    repl.handle("/etc/passwd is what?")
    assert session.prompts[0] == [{"role": "user", "content": "/etc/passwd is what?"}]


def test_an_unknown_command_names_the_nearest(repl: Repl) -> None:
    with pytest.raises(InputError) as e:
        repl.handle("/imgae x.png")
    assert "/image" in str(e.value.hint)


def test_undo_takes_back_one_turn(repl: Repl, session: RoteSession) -> None:
    for line in ("first?", "second?", "/undo", "third?"):
        repl.handle(line)
    assert [m["content"] for m in session.prompts[-1]] == ["first?", "reply 1 end", "third?"]
    repl.handle("/undo")
    repl.handle("/undo")
    with pytest.raises(InputError, match="the conversation is empty"):
        repl.handle("/undo")


def test_retry_asks_the_same_again(repl: Repl, session: RoteSession, picture: Path) -> None:
    repl.handle(f"/image {picture}")
    repl.handle("what?")
    repl.handle("/retry")
    assert session.prompts[0] == session.prompts[1] == [question(picture, "what?")]
    assert repl.conversation.messages[-1]["content"] == "reply 2 end"


def test_edit_offers_the_question(repl: Repl, session: RoteSession, picture: Path) -> None:
    repl.handle(f"/image {picture}")
    repl.handle("wath?")
    repl.handle("/edit")
    assert repl.reader._draft == "wath?"
    repl.handle("what?")
    assert session.prompts[-1] == [question(picture, "what?")]


@pytest.mark.parametrize(("after", "kept"), [(1, "reply "), (2, "reply 1 ")])
def test_an_interrupt_keeps_what_was_said(
    repl: Repl, session: RoteSession, after: int, kept: str, capsys: pytest.CaptureFixture[str]
) -> None:
    session.interrupt_after = after
    with pytest.raises(KeyboardInterrupt):
        repl.handle("first?")
    assert capsys.readouterr().out == f"{kept}\n"
    session.interrupt_after = None
    repl.handle("second?")
    assert [m["content"] for m in session.prompts[-1]] == ["first?", kept, "second?"]


def test_an_interrupt_before_the_reply_takes_the_question_back(
    repl: Repl, session: RoteSession, picture: Path
) -> None:
    session.interrupt_after = 0
    repl.handle(f"/image {picture}")
    with pytest.raises(KeyboardInterrupt):
        repl.handle("first?")
    session.interrupt_after = None
    repl.handle("second?")
    assert session.prompts[-1] == [question(picture, "second?")]


def test_an_empty_reply_is_a_reply(
    repl: Repl, session: RoteSession, capsys: pytest.CaptureFixture[str]
) -> None:
    session.answer = ""
    repl.handle("first?")
    assert capsys.readouterr().out == "\n"
    session.answer = "reply {}"
    repl.handle("second?")
    assert [m["content"] for m in session.prompts[-1]] == ["first?", "", "second?"]


def test_a_home_that_cannot_be_written_is_no_failure(
    repl: Repl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    repl.handle("first?")
    assert capsys.readouterr() == ("reply 1 end\n", "")


def test_json_of_an_interrupted_reply(
    repl: Repl, session: RoteSession, capsys: pytest.CaptureFixture[str]
) -> None:
    repl.as_json, session.interrupt_after = True, 1
    with pytest.raises(KeyboardInterrupt):
        repl.handle("first?")
    assert json.loads(capsys.readouterr().out)["finish_reason"] == "cancelled"


def test_clear_forgets_all_but_the_settings(repl: Repl, session: RoteSession, picture: Path) -> None:
    for line in ("/system Be brief.", "/set temp 0.5", "first?", f"/image {picture}", "/clear", "second?"):
        repl.handle(line)
    assert session.prompts[-1] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "second?"},
    ]
    assert session.settings[-1]["temperature"] == 0.5
