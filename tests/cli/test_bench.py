"""`qvl bench`."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest

from qvl.cli.bench import parse_size
from qvl.cli.main import run
from qvl.convert import Converted
from qvl.runtime import load
from qvl.runtime.errors import InputError
from qvl.runtime.measure.speed import measure

ARGS = ["bench", "--sizes", "56,140x84", "--read", "600", "--write", "4", "-r", "2", "-t", "1"]


def test_every_figure_is_there(tiny_model: Converted, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*ARGS, "-m", str(tiny_model.text), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [(row["width"], row["height"], row["amount"]) for row in said["encode"]] == [
        (56, 56, 16),
        (140, 84, 60),
    ]
    for row in (*said["encode"], said["read"], said["write"], said["first_token"]):
        assert len(row["seconds"]) == 2
        assert row["rate"] == pytest.approx(row["amount"] / row["median"])
    assert (said["read"]["amount"], said["write"]["amount"]) == (600, 4)
    assert said["peak_bytes"] > tiny_model.text.stat().st_size
    assert said["threads"] == 1


def test_the_table(tiny_model: Converted, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*ARGS, "-m", str(tiny_model.text)]) == 0
    out = capsys.readouterr().out
    for words in (
        "picture of 140 x 84",
        "60 patches",
        "600 tokens",
        "first token about 56 x 56",
        "peak memory",
    ):
        assert words in out


def test_the_time_is_that_of_the_work(tiny_model: Converted, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an encoding takes longer shows in its figure."""
    with load(tiny_model.text) as model:
        encode = model.vision.encode

        def slow(*args: object) -> object:
            time.sleep(0.5)
            return encode([np.zeros((56, 56, 3), np.uint8)])

        monkeypatch.setattr(model.vision, "encode", slow)
        speed = measure(model, sizes=[(56, 56)], n_read=8, n_write=2, repeat=1)
    assert speed.encode[56, 56].median >= 0.5
    assert speed.encode[56, 56].amount == 16


@pytest.mark.parametrize(
    ("text", "size"), [("448", (448, 448)), ("1600x400", (1600, 400)), (" 56x28", (56, 28))]
)
def test_sizes(text: str, size: tuple[int, int]) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "4x", "x4", "-1", "0x5", "big", "1x2x3"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InputError):
        parse_size(text)
