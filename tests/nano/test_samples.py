"""The nano model on models/samples, from conversion to answer, in the types that people use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.sample_answers import SAMPLES, TABLE, TYPES, questions, reply

from qvl.cli.main import run
from qvl.convert import Converted
from qvl.runtime import load

Nano = Callable[[str, str], Converted]


@pytest.mark.parametrize("text_type", TYPES)
def test_what_is_said_of_the_samples_is_true(nano: Nano, text_type: str) -> None:
    """All but what the table says is wrong; `support.sample_answers` brings it up to date."""
    made = nano(text_type, TYPES[text_type])
    known = set(json.loads(TABLE.read_text(encoding="utf-8"))[text_type])
    asked = list(questions())
    with load(made.text, made.mmproj, device="cpu", n_ctx=1024) as model:
        said = {q: reply(model, q) for q in asked if q.name not in known}
    assert [(q.name, text, q.truth) for q, text in said.items() if not q.true(text)] == []
    assert len(said) >= 0.6 * len(asked)


def test_truth_is_told_from_error() -> None:
    """A reply that is true of another sample is wrong, and so is a box elsewhere or none."""
    asked = list(questions())
    assert all(q.true(q.truth) for q in asked)
    for q in asked:
        assert not any(q.true(o.truth) for o in asked if o.text == q.text and o.truth != q.truth)
        assert not q.true("")


@pytest.mark.parametrize("text_type", TYPES)
def test_the_commands_say_it(
    nano: Nano, text_type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`qvl chat` on the converted folder, and `qvl caption` on several samples."""
    folder = str(nano(text_type, TYPES[text_type]).text.parent)
    known = set(json.loads(TABLE.read_text(encoding="utf-8"))[text_type])
    chosen = [q for q in questions() if q.name not in known]
    first = {(len(q.files), q.video): q for q in reversed(chosen) if "box" not in q.truth}
    assert len(first) >= 2
    for q in first.values():
        flag = "--video" if q.video else "--image"
        media = [part for name in q.files for part in (flag, str(SAMPLES / name))]
        assert run(["chat", "-q", "-m", folder, "-c", "1024", *media, "-p", q.text]) == 0
        assert capsys.readouterr().out.strip() == q.truth

    described = {q.files[0]: q.truth for q in chosen if q.text == "Describe this image."}
    paths = [str(SAMPLES / name) for name in described]
    assert (
        run(
            [
                "caption",
                "-q",
                "-m",
                folder,
                "-p",
                "Describe this image.",
                "-o",
                str(tmp_path / "o.jsonl"),
                *paths,
            ]
        )
        == 0
    )
    records = map(json.loads, (tmp_path / "o.jsonl").read_text(encoding="utf-8").splitlines())
    assert {Path(r["path"]).name: r["caption"] for r in records} == described
