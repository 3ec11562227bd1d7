"""The conversation behind the prompt, with a model that answers by rote."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qvl.cli.chat.commands import COMMANDS, Leave
from qvl.cli.chat.conversation import Conversation
from qvl.cli.chat.repl import Repl
from qvl.cli.chat.report import reply_json
from qvl.cli.options import SamplingOptions
from qvl.cli.output import Output
from qvl.runtime.engine.reply import Reply
from qvl.runtime.errors import ImageError, InputError, OutputError
from qvl.runtime.vision.preprocess import Preprocessor


@dataclass
class RoteSession:
    """Answers "one", "two", … and remembers what it was asked."""

    prompts: list[list[dict[str, Any]]] = field(default_factory=list)
    settings: list[dict[str, Any]] = field(default_factory=list)
    looked_at: list[list[dict[str, Any]]] = field(default_factory=list)
    interrupt_after: int | None = None
    answer: str = "reply {} end"
    n_ctx: int = 4096

    def generate(self, messages: list[dict[str, Any]], **kwargs: Any) -> Any:
        self.prompts.append(messages)
        self.settings.append(kwargs)
        words = [word for word in re.split(r"(?<= )", self.answer.format(len(self.prompts))) if word]
        return RoteStream(words, self.interrupt_after)

    def prefill(self, messages: list[dict[str, Any]], **kwargs: Any) -> None:
        self.looked_at.append(messages)


@dataclass
class RoteStream:
    pieces: list[str]
    interrupt_after: int | None
    dropped_messages: int = 0

    def __iter__(self) -> Iterator[Any]:
        for i, text in enumerate(self.pieces):
            if i == self.interrupt_after:
                raise KeyboardInterrupt
            yield SimpleNamespace(text=text)

    def cancel(self) -> None:
        self.pieces = []

    def result(self) -> Reply:
        return Reply("".join(self.pieces), (), "stop" if self.pieces else "cancelled")


@pytest.fixture
def session() -> RoteSession:
    return RoteSession()


@pytest.fixture
def repl(session: RoteSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Repl]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    model: Any = SimpleNamespace(
        session=lambda: session, path=Path("m.gguf"), vision=SimpleNamespace(preprocessor=Preprocessor())
    )
    repl = Repl(Conversation(model, SamplingOptions()), Output())
    yield repl
    repl.conversation.close()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    Image.new("RGB", (200, 100), "white").save(path)
    return path


def question(picture: Path, text: str) -> dict[str, Any]:
    return {
        "role": "user",
        "content": [{"type": "image", "image": str(picture)}, {"type": "text", "text": text}],
    }


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
    for line, words in ((f"'{tmp_path}/notes.txt'", "neither a picture"), (str(tmp_path), "a folder")):
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
    with pytest.raises(InputError, match="nothing"):
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


@pytest.mark.parametrize(
    "line",
    [
        "/set nothing 1",
        "/set temp hot",
        "/set temp nan",
        "/set temp inf",
        "/set top_k -1",
        "/set max_tokens 0",
        "/set temp",
    ],
)
def test_a_setting_that_cannot_be_is_refused(repl: Repl, line: str) -> None:
    with pytest.raises(InputError):
        repl.handle(line)
    assert repl.conversation.sampling == SamplingOptions()


def test_save_and_load(repl: Repl, session: RoteSession, picture: Path) -> None:
    for line in (
        f"{picture} what?",
        "/set seed 7",
        "/system Be brief.",
        "/save talk",
        "/clear",
        "/system none",
    ):
        repl.handle(line)
    repl.handle("/load talk")
    repl.handle("and?")
    assert session.prompts[-1] == [
        {"role": "system", "content": "Be brief."},
        question(picture, "what?"),
        {"role": "assistant", "content": "reply 1 end"},
        {"role": "user", "content": "and?"},
    ]
    assert session.settings[-1]["seed"] == 7


BOX = "<|object_ref_start|>the bike<|object_ref_end|><|box_start|>(100,200),(500,900)<|box_end|>"


def test_boxes_are_shown_kept_and_drawn(
    repl: Repl, session: RoteSession, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session.answer = f"It is {BOX} here"
    repl.handle(f"{picture} where?")
    assert capsys.readouterr().out == "It is the bike [20, 20, 100, 90] here\n"
    assert repl.conversation.messages[-1]["content"] == f"It is {BOX} here"
    said = reply_json(repl.conversation)
    where = {"picture": 1, "image": str(picture)}
    assert said["boxes"] == [{"label": "the bike", "box": [20, 20, 100, 90], **where}]
    assert said["text"] == "It is the bike [20, 20, 100, 90] here"
    repl.handle(f"/draw {tmp_path}/out.png")
    drawn = np.asarray(Image.open(tmp_path / "out.png"))
    assert len(np.unique(drawn.reshape(-1, 3), axis=0)) > 2
    with pytest.raises(OutputError, match=r"out\.nonsense"):
        repl.handle(f"/draw {tmp_path}/out.nonsense")


def test_boxes_go_to_the_picture_that_is_named(
    repl: Repl, session: RoteSession, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "b.png"
    Image.new("RGB", (100, 200), "white").save(other)
    on_a, on_b = [20, 20, 100, 90], [10, 40, 50, 180]

    def boxes(answer: str, message: str) -> list[tuple[list[int], int, str]]:
        session.answer = answer
        repl.handle(message)
        said = reply_json(repl.conversation)["boxes"]
        return [(box["box"], box["picture"], Path(box["image"]).name) for box in said]

    assert boxes(BOX, f"{picture} {other} where is it?") == [(on_b, 2, "b.png")]
    out, err = capsys.readouterr()
    assert out == f"the bike {on_b}\n" and "boxes in picture 2 (b.png)" in err
    assert boxes(BOX, "And in the first picture?") == [(on_a, 1, "a.png")]
    assert boxes(f"Picture 2: {BOX} Picture 1: {BOX}", "And in picture 1?") == [
        (on_b, 2, "b.png"),
        (on_a, 1, "a.png"),
    ]
    repl.handle(f"/draw {tmp_path}/out.png")
    assert Image.open(tmp_path / "out-2.png").size[0] * 2 == Image.open(tmp_path / "out-2.png").size[1]
    drawn = Image.open(tmp_path / "out-1.png")
    assert drawn.width == 2 * drawn.height and not (tmp_path / "out.png").exists()
    assert boxes(BOX, "Find it in b.png") == [(on_b, 2, "b.png")]


def test_a_malformed_box_is_reported(
    repl: Repl, session: RoteSession, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session.answer = "Here <|box_start|>(1,2)<|box_end|> it is"
    repl.handle(f"{picture} where?")
    out, err = capsys.readouterr()
    assert out == "Here (1,2) it is\n"
    assert "warning: box '(1,2)'" in err
    with pytest.raises(InputError, match="no boxes"):
        repl.handle("/draw")


def test_exit(repl: Repl) -> None:
    for line in ("/exit", "/quit", "/bye", "exit", " Quit "):
        with pytest.raises(Leave):
            repl.handle(line)


def test_help_names_every_command(repl: Repl, capsys: pytest.CaptureFixture[str]) -> None:
    repl.handle("/help")
    text = capsys.readouterr().err
    assert all(f"/{name}" in text for name in COMMANDS)


def test_completion(repl: Repl, picture: Path) -> None:
    folder = picture.parent
    assert repl.reader.completions("/im") == ["/image "]
    assert repl.reader.completions(f"what is {folder}/a.") == [f"{folder}/a.png"]
    (folder / "far off").mkdir()
    (folder / "far off" / "my photo.png").touch()
    (folder / "\x1b[31mred.png").touch()
    assert repl.reader.completions(f"/image {folder}/far\\ of") == [f"{folder}/far\\ off/"]
    assert repl.reader.completions(f"{folder}/far\\ off/my") == [f"{folder}/far\\ off/my\\ photo.png"]
    assert repl.reader.completions(f"'{folder}/far off/my p") == [f"'{folder}/far off/my photo.png'"]
    assert repl.reader.completions(f"{folder}/\x1b") == []
    repl.handle(f"/image {picture}")
    assert repl.reader.completions("/detach ") == ["a.png"]
    repl.handle("/save my chat")
    assert repl.reader.completions("/load my") == ["my\\ chat"]
    assert repl.reader.completions("/set top_") == ["top_k", "top_p"]


def test_a_session_keeps_its_whole_name(repl: Repl, tmp_path: Path) -> None:
    repl.handle("/save my chat")
    assert (tmp_path / "state" / "qvl" / "sessions" / "my chat.json").exists()
    repl.handle("/load my chat")
    repl.handle("/load 'my chat'")
    repl.handle(f"/save {tmp_path}/my talk.json")
    assert (tmp_path / "my talk.json").exists()


def test_commands_pasted_together_run_one_by_one(repl: Repl, session: RoteSession, picture: Path) -> None:
    repl.handle(f"/image {picture}\n/set seed 3\n")
    assert repl.conversation.sampling.seed == 3 and repl.conversation.pending
    repl.handle("first line\n/second line")
    assert session.prompts[0][0]["content"][-1]["text"] == "first line\n/second line"


@pytest.mark.parametrize("command", ["/help", "/set", "/system", "/stats", "/save x"])
def test_what_a_command_was_asked_for_is_shown_with_quiet(
    repl: Repl, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    repl.handle("first?")
    repl.out = Output(quiet=True)
    capsys.readouterr()
    repl.handle(command)
    assert capsys.readouterr().err


def test_a_saved_reply_is_readable_and_goes_back_as_it_was(
    repl: Repl, session: RoteSession, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session.answer = f"It is {BOX} here"
    repl.handle(f"{picture} where?")
    repl.handle("/save talk")
    saved = json.loads((tmp_path / "state" / "qvl" / "sessions" / "talk.json").read_text())["messages"][-1]
    readable = "It is the bike [20, 20, 100, 90] here"
    assert (saved["content"], saved["raw"]) == (readable, f"It is {BOX} here")
    assert [box["box"] for box in saved["boxes"]] == [[20, 20, 100, 90]]
    capsys.readouterr()
    repl.handle("/load talk")
    shown = capsys.readouterr().err
    assert readable in shown and "<|" not in shown
    with pytest.raises(InputError, match="no reply since the conversation was loaded"):
        repl.handle("/stats")
    repl.handle("and?")
    assert session.prompts[-1][1] == {"role": "assistant", "content": f"It is {BOX} here"}


def test_draw_writes_over_no_input_and_asks_before_it_overwrites(
    repl: Repl, session: RoteSession, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.answer = BOX
    before = picture.read_bytes()
    repl.handle(f"{picture} where?")
    (tmp_path / "link.png").symlink_to(picture)
    for name in ("a.png", "link.png"):
        for force in (False, True):
            with pytest.raises(OutputError, match="is read by this command"):
                repl.draw(tmp_path / name, force=force)
    out = tmp_path / "out.png"
    out.write_bytes(b"mine")
    monkeypatch.setattr(repl.reader, "confirms", lambda question: False)
    with pytest.raises(OutputError, match="exists"):
        repl.handle(f"/draw {out}")
    assert out.read_bytes() == b"mine" and picture.read_bytes() == before
    monkeypatch.setattr(repl.reader, "confirms", lambda question: "overwrite" in question)
    repl.handle(f"/draw {out}")
    assert out.read_bytes().startswith(b"\x89PNG")
    monkeypatch.chdir(tmp_path)
    repl.handle("/draw")
    repl.handle("/draw")
    assert (tmp_path / "a-boxes.png").exists() and (tmp_path / "a-boxes-2.png").exists()
    repl.handle("/draw new/folder/a.png")
    assert (tmp_path / "new" / "folder" / "a.png").exists()


def test_a_conversation_draws_every_reply_that_has_boxes(
    repl: Repl, session: RoteSession, picture: Path, tmp_path: Path
) -> None:
    repl.draw_to = tmp_path / "boxes.png"
    repl.handle(f"{picture} what?")
    assert not repl.draw_to.exists()
    session.answer = BOX
    repl.handle("where?")
    first = repl.draw_to.read_bytes()
    session.answer = BOX.replace("(100,200)", "(300,300)")
    repl.handle("and now?")
    assert repl.draw_to.read_bytes() != first
