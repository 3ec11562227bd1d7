"""Which pictures are asked what."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qvl.runtime.errors import InputError
from qvl.runtime.measure.samples import QUESTIONS, load_samples, sample_pictures


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for name in ("b.png", "a.JPG", "notes.txt", "below/c.webp"):
        path = tmp_path / "p" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "p"


def test_pictures_are_asked_in_turn(pictures: Path, tmp_path: Path) -> None:
    names = [(Path(s.image).name, s.prompt) for s in load_samples(pictures)]
    assert names == list(zip(["a.JPG", "b.png", "c.webp"], QUESTIONS, strict=False))
    file = tmp_path / "q.txt"
    file.write_text("one?\n\ntwo?\n")
    assert [(Path(s.image).name, s.prompt) for s in load_samples(pictures, file)] == [
        ("a.JPG", "one?"), ("b.png", "two?"), ("c.webp", "one?"),
    ]  # fmt: skip
    file.write_text("1\n2\n3\n4\n")
    assert [s.prompt for s in load_samples(pictures / "b.png", file)] == ["1", "2", "3", "4"]
    assert len(load_samples(pictures, file, limit=2)) == 2


def test_json_lines_name_their_pictures(pictures: Path, tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text('{"image": "b.png", "prompt": "one?"}\n{"prompt": "two?"}\n')
    with_folder, beside = load_samples(pictures, file), load_samples(None, file)
    assert [s.image for s in with_folder] == [pictures / "b.png", None]
    assert beside[0].image == tmp_path / "b.png"
    assert [part["type"] for part in with_folder[1].messages[0]["content"]] == ["text"]
    file.write_text('{"image": "b.png", "prompt": "one?"}\n{"image": "b.png"}\n')
    with pytest.raises(InputError, match="line 2"):
        load_samples(pictures, file)


def test_our_own_pictures_come_with_questions() -> None:
    listed = json.loads((sample_pictures() / "answers.json").read_text(encoding="utf-8"))
    questions = {question for record in listed for question, _ in record["turns"]}
    found = load_samples()
    assert len(found) >= 16
    assert {s.prompt for s in found} <= questions
    assert all(Path(s.image).is_file() for s in found)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe\x00"])
def test_nothing_to_ask(pictures: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "q.txt").write_bytes(content)
    with pytest.raises(InputError, match=r"q\.txt"):
        load_samples(pictures, tmp_path / "q.txt")
    with pytest.raises(InputError, match="no pictures"):
        load_samples(tmp_path / "nowhere")
