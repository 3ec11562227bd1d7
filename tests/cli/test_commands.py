"""Settings, sessions, boxes and completion of a conversation, with a model that answers by rote."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.rote import RoteSession, question

from qvl.cli.chat.commands import COMMANDS, Leave
from qvl.cli.chat.repl import Repl
from qvl.cli.chat.report import reply_json
from qvl.cli.options import SamplingOptions
from qvl.cli.output import Output
from qvl.runtime.errors import InputError, OutputError

BOX = "<|object_ref_start|>the bike<|object_ref_end|><|box_start|>(100,200),(500,900)<|box_end|>"


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


@pytest.mark.parametrize("is_there", [True, False])
def test_a_session_of_an_earlier_version_is_made_readable(
    repl: Repl, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], is_there: bool
) -> None:
    messages = [question(picture, "where?"), {"role": "assistant", "content": f"It is {BOX} here"}]
    old = {"qvl_session": 1, "model": None, "system": None, "settings": {}, "messages": messages}
    (tmp_path / "old.json").write_text(json.dumps(old))
    if not is_there:
        picture.write_bytes(b"damaged")
    repl.handle(f"/load {tmp_path}/old.json")
    box = [20, 20, 100, 90] if is_there else [100, 200, 500, 900]  # thousandths where there is no size
    assert f"It is the bike {box} here" in capsys.readouterr().err
    assert repl.conversation.messages[-1]["content"] == messages[-1]["content"]
    where = {"picture": 1, "image": str(picture)} if is_there else {}
    saved = repl.conversation.saved().messages[-1]
    assert saved["boxes"] == [{"label": "the bike", "box": box, **where}]
    assert (saved["content"], saved["raw"]) == (f"It is the bike {box} here", messages[-1]["content"])


def test_draw_writes_over_no_input_and_asks_before_it_overwrites(
    repl: Repl, session: RoteSession, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.answer = BOX
    before = picture.read_bytes()
    repl.handle(f"{picture} where?")
    (tmp_path / "link.png").symlink_to(picture)
    for name in ("a.png", "link.png"):
        for force in (False, True):
            with pytest.raises(OutputError, match="is an input"):
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
