"""Paths as terminals paste them, and messages that mention pictures."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qvl.cli.chat.attachments import attach, extract, lone_path, looks_like_path, shown, split_paths, unmet
from qvl.cli.chat.line_editor import path_completions
from qvl.runtime.errors import ImageError, InputError

NAMES = ["photo.jpg", "my photo.png", "it's.webp", "a (1).jpeg", "naïve ü.avif", "x.y.z.gif", "tab\tin.png"]


@pytest.fixture(params=NAMES)
def picture(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "some folder" / request.param
    path.parent.mkdir()
    path.write_bytes(b"\x89PNG")
    return path


def as_dropped(path: Path) -> dict[str, str]:
    """What terminals write when a file is dropped: VTE and kitty quote, macOS escapes, others use a URI."""
    escaped = "".join(f"\\{c}" if c in " '()\"\t" else c for c in str(path))
    vte = "'" + str(path).replace("'", "'\\''") + "'"
    return {"quoted": shlex.quote(str(path)), "vte": vte, "escaped": escaped, "uri": path.as_uri()}


@pytest.mark.parametrize("style", ["quoted", "vte", "escaped", "uri"])
def test_a_dropped_path_is_one_argument(picture: Path, style: str) -> None:
    text = as_dropped(picture)[style]
    assert split_paths(f"{text} other.png") == [str(picture), "other.png"]
    assert split_paths(f'"{picture}"') == [str(picture)]


@pytest.mark.parametrize("style", ["quoted", "vte", "escaped", "uri"])
def test_a_message_that_mentions_a_picture_attaches_it(picture: Path, style: str) -> None:
    text, found = extract(f"what is in {as_dropped(picture)[style]} ?")
    assert [a.path for a in found] == [picture.resolve()]
    assert text == "what is in ?"


@pytest.mark.parametrize("style", ["quoted", "double", "escaped", "completed", "bare"])
@pytest.mark.parametrize("name", ["my red star.png", "it's (1).webp", "star.png"])
def test_a_relative_path_attaches_in_every_spelling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, style: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).touch()
    spellings = {
        "quoted": shlex.quote(name),
        "double": f'"{name}"',
        "escaped": "".join(f"\\{c}" if c in " '()" else c for c in name),
        "completed": path_completions(name[:2] if name[2] != "'" else "it\\'")[0],
        "bare": f"./{name}",
    }
    for message in ("what is {}?", "{} what?", "look at {}, please", "(see {})", "it's {}"):
        text, found = extract(message.format(spellings[style]))
        assert [a.path.name for a in found] == [name], message
        assert name not in text


@pytest.mark.parametrize("space", ["\u202f", "\u00a0", "\u3000"])
def test_other_spaces_belong_to_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, space: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"Shot{space}PM.png"
    path.touch()
    assert split_paths(f"{path} b.png") == [str(path), "b.png"]
    assert extract(f"Shot{space}PM.png what?") == ("what?", attach([str(path)], "image"))
    # a plain space in its place finds it, where no other file could be meant
    assert [a.path for a in attach(["Shot PM.png"], "image")] == [path]
    (tmp_path / "Shot\u2009PM.png").touch()
    with pytest.raises(ImageError, match="no such file"):
        attach(["Shot PM.png"], "image")


def test_a_web_address_says_what_to_do() -> None:
    with pytest.raises(ImageError, match=r"https://a\.example/b\.png: a web address") as caught:
        attach(["https://a.example/b.png"], "image")
    assert "download" in str(caught.value.hint)


def test_a_path_with_bare_spaces_is_found(tmp_path: Path) -> None:
    path = tmp_path / "my holiday photo.png"
    path.touch()
    assert extract(f"{path} what is this?") == ("what is this?", attach([str(path)], "image"))


def test_a_mention_may_end_with_punctuation(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.touch()
    text, found = extract(f"compare it with {path}, please.")
    assert [a.path for a in found] == [path]
    assert text == "compare it with , please."


def test_pictures_keep_the_order_of_the_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b.png", "a.png", "clip.mp4"):
        (tmp_path / name).touch()
    text, found = extract(f"b.png {tmp_path / 'clip.mp4'} ./a.png which differ?")
    kinds = {"b.png": "image", "clip.mp4": "video", "a.png": "image"}
    assert [(a.path.name, a.kind) for a in found] == list(kinds.items())
    assert text == "which differ?"


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.png").touch()
    assert split_paths("~/a.png") == [str(tmp_path / "a.png")]
    assert extract("~/a.png")[1] == attach([str(tmp_path / "a.png")], "image")


@pytest.mark.parametrize(
    "message",
    [
        "is /etc/passwd a picture?",
        "either/or, and/or",
        "what does no-such-file.png show?",
        "1/2 + 3/4",
        "'quoted' \"words\"",
    ],
)
def test_words_are_left_alone(message: str) -> None:
    assert extract(message) == (message, [])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(message=st.text(max_size=200))
def test_no_message_is_changed_or_refused_without_a_picture(message: str) -> None:
    assert extract(message) == (message, [])


@given(names=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1), max_size=5))
def test_quoting_as_a_shell_does_brings_back_the_names(names: list[str]) -> None:
    # Between single quotes everything stands for itself, but ~ and file:// keep their meaning.
    plain = [name for name in names if not name.startswith(("~", "file://"))]
    assert split_paths(" ".join(map(shlex.quote, plain))) == plain
    vte = ["'" + name.replace("'", "'\\''") + "'" for name in plain]
    assert split_paths(" ".join(vte)) == plain


@pytest.mark.parametrize(
    ("line", "is_path"),
    [
        ("/help", False),
        ("/image a.png", False),
        ("/tmp/a.png what?", True),
        ("/photo.jpg", True),
        ("/nonsense", False),
    ],
)
def test_a_path_is_told_from_a_command(line: str, is_path: bool) -> None:
    assert looks_like_path(line) == is_path


def test_patterns_stand_for_what_they_match(tmp_path: Path) -> None:
    for name in ("b.png", "a.png", "c.txt", "odd[1].png"):
        (tmp_path / name).touch()
    found = attach([f"{tmp_path}/?.png", f"{tmp_path}/odd[1].png"], "image")
    assert [a.path.name for a in found] == ["a.png", "b.png", "odd[1].png"]
    with pytest.raises(ImageError, match="no such file"):
        attach([f"{tmp_path}/*.jpg"], "image")


def test_a_path_alone_is_told_from_a_text(tmp_path: Path) -> None:
    path = tmp_path / "some notes.txt"
    path.touch()
    assert {lone_path(form) for form in as_dropped(path).values()} == {path}
    assert lone_path(f"'{tmp_path}'") == tmp_path
    for text in (f"{path} is what?", f"what is {path}", "notes", "/no/such", "", "'", "~nobody/x"):
        assert lone_path(text) is None


def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to("b.png")
    with pytest.raises(ImageError, match=r"a\.png: a link to b\.png, which is not there"):
        attach([str(tmp_path / "a.png")], "image")


def test_names_that_no_file_can_have() -> None:
    for name, reason in (("a" * 300 + ".png", "File name too long"), ("a\0.png", "null byte")):
        with pytest.raises(ImageError, match=f"cannot be read: .*{reason}"):
            attach([name], "image")
    assert not looks_like_path("/" + "a" * 300)


def test_a_home_of_nobody_is_a_name(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"~nobody-of-this-name/a\.png: no such file"):
        attach(split_paths("~nobody-of-this-name/a.png"), "image")


def test_what_cannot_be_attached_says_so(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no such file"):
        attach([str(tmp_path / "none.png")], "image")
    with pytest.raises(ImageError, match="a folder"):
        attach([str(tmp_path)], "image")
    with pytest.raises(InputError, match="no video given"):
        attach([], "video")


def test_paths_are_shown_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert shown(tmp_path / "sub" / "a.png") == "sub/a.png"
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert shown(tmp_path / "a.png") == "~/a.png"
    assert shown(Path("/elsewhere/a.png")) == "/elsewhere/a.png"


@pytest.mark.parametrize(
    "text",
    ["word and words. " * 20_000, "/a b " * 20_000, "x" * 300_000, "." * 100_000 + "x.png", "/a.png " * 2000],
)
def test_long_texts_take_no_time(text: str) -> None:
    """Pasted logs, base64 and listings: no search that grows with the square of the text."""
    started = time.process_time()
    assert extract(text) == (text, [])
    unmet(text, [])
    assert time.process_time() - started < 5
