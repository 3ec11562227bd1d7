from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvl.runtime.caption.assemble import Wording, join
from qvl.runtime.caption.prompts import Prompt, Prompts, Template, Variables
from qvl.runtime.errors import InputError


def of(text: str, path: str = "set/cat.jpg", variables: Variables | None = None) -> Prompt:
    columns = variables.columns if variables else ()
    return Prompts(Template(text, columns), variables).of(path, 640, 480)


def test_a_template_knows_the_picture() -> None:
    assert of("{stem} ({name}) in {dir}, {width}x{height}").text == "cat (cat.jpg) in set, 640x480"


@pytest.mark.parametrize(
    ("name", "text"), [("a.jpg", "Describe this image."), ("a.MP4", "Describe this video.")]
)
def test_what_is_asked_by_default(name: str, text: str, tmp_path: Path) -> None:
    assert Prompts().of(str(tmp_path / name), 1, 1).text == text
    (tmp_path / "a.prompt.txt").write_text("Its own.")
    assert Prompts().of(str(tmp_path / name), 1, 1).text == "Its own."


def test_a_models_own_words_stand_in_for_pictures_alone(tmp_path: Path) -> None:
    prompts = Prompts(caption="Describe the image in {English}:")
    assert prompts.of(str(tmp_path / "a.jpg"), 1, 1) == Prompt("", "Describe the image in {English}:")
    assert prompts.of(str(tmp_path / "a.mp4"), 1, 1).text == "Describe this video."
    assert Prompts(Template("Say {stem}."), caption="Own").of("a.jpg", 1, 1).text == "Say a."
    (tmp_path / "a.prompt.txt").write_text("Its own.")
    assert prompts.of(str(tmp_path / "a.jpg"), 1, 1).text == "Its own."


def test_the_picture_may_stand_anywhere() -> None:
    assert of("Describe.") == Prompt("", "Describe.")
    assert of("Look at {image} closely.") == Prompt("Look at ", " closely.")
    assert of("Look at {image} closely.").text == "Look at {image} closely."


@given(st.text(alphabet=st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_text_without_a_known_name_stays_as_it_is(text: str) -> None:
    try:
        template = Template(text)
    except InputError:
        return
    if not template.names and "{{" not in text:
        assert template.fill({}).text == text


def test_braces_of_json_stay() -> None:
    text = 'Answer as {"shape": {"kind": "…"}}, {} or {{word}}.'
    assert of(text).text == 'Answer as {"shape": {"kind": "…"}}, {} or {word}.'


def test_an_unknown_name_is_refused_at_once() -> None:
    with pytest.raises(InputError, match=r"\{subject\}") as caught:
        Template("A photo of {subject}", ("artist",))
    assert "artist" in str(caught.value.hint)


def write_csv(path: Path, *rows: list[str]) -> Path:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    path.write_text(text.getvalue(), encoding="utf-8")
    return path


def test_columns_of_a_csv(tmp_path: Path) -> None:
    file = write_csv(
        tmp_path / "v.csv",
        ["artist", "file", "tags"],
        ["Ada, L.", "cat.jpg", "{name}"],
        ["Bo", "other/dog.jpg", ""],
    )
    variables = Variables.read(file)
    assert (
        of("By {artist}: {tags}", variables=variables).text == "By Ada, L.: {name}"
    )  # a value is no template
    assert of("By {artist}", "other/dog.jpg", variables).text == "By Bo"
    assert of("No column", "unknown.jpg", variables).text == "No column"
    with pytest.raises(InputError, match=r"elsewhere/dog\.jpg: no row"):
        of("By {artist}", "elsewhere/dog.jpg", variables)


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([["artist", "year"], ["a", "1"]], "no column names the pictures, only artist, year"),
        ([["file", "year"], ["a"]], "row 2 does not have 2 fields"),
        ([["file", "year"], ["a", "1"], ["b", "2", "3"]], "row 3 does not have 2 fields"),
        ([], "empty, expected CSV with a header"),
    ],
)
def test_a_csv_that_does_not_fit(tmp_path: Path, rows: list[list[str]], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        Variables.read(write_csv(tmp_path / "v.csv", *rows))


@pytest.mark.parametrize("name", ["cat.prompt.txt", "cat.jpg.prompt.txt"])
def test_a_prompt_beside_the_picture_comes_first(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("What is {stem} doing?\n", encoding="utf-8")
    assert of("Describe.", str(tmp_path / "cat.jpg")).text == "What is cat doing?"
    (tmp_path / name).write_text("{nothing}", encoding="utf-8")
    with pytest.raises(InputError, match=rf"{name}: the prompt has {{nothing}}"):
        of("Describe.", str(tmp_path / "cat.jpg"))


def test_wording() -> None:
    wording = Wording(prefix="photo, ", suffix=" --v 5", triggers=("sks", "red"))
    assert wording.caption("A red square.\n") == "sks, photo, A red square. --v 5"
    assert Wording().caption("  text ") == "text"


def test_old_and_new_captions_are_joined() -> None:
    assert join("A cat.", "It sleeps.", "append") == "A cat. It sleeps."
    assert join("cat, sofa", "red", "append") == "cat, sofa, red"
    assert join("cat", "red", "prepend") == "red, cat"
    assert join(None, "red", "append") == join("", "red", "prepend") == "red"


def test_prompt_files_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "a.prompt.txt").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"a\.prompt\.txt: the prompt is no text in UTF-8"):
        Prompts().of(str(tmp_path / "a.jpg"), 1, 1)
    (tmp_path / "b.prompt.txt").mkdir()
    with pytest.raises(InputError, match=r"b\.prompt\.txt: the prompt cannot be read: Is a directory"):
        Prompts().of(str(tmp_path / "b.jpg"), 1, 1)
    assert Prompts().of(str(tmp_path / f"{'c' * 250}.jpg"), 1, 1).text == "Describe this image."
