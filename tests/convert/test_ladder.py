"""`qvl convert --fit`: the best types that fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qvl.cli.main import run
from qvl.convert import Converted, convert
from qvl.convert.ladder import LADDER, choose, parse_size
from qvl.convert.mixtures import TEXT_RECIPES, VISION_RECIPES
from qvl.runtime.errors import InputError
from qvl.runtime.ggml.gguf import read_gguf

MEASURED = Path(__file__).resolve().parents[2] / "benchmarks" / "quantization.json"


@pytest.mark.parametrize(
    ("text", "size"),
    [("3GB", 3_000_000_000), ("2.5g", 2_500_000_000), ("800 MiB", 838_860_800), ("12kB", 12_000), ("7", 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "0", "-3GB", "3TB", "3 GB more", "1e9"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InputError, match="not a size"):
        parse_size(text)


def test_nothing_measured_beats_a_rung() -> None:
    """In size and KL at once, of what needs no importance matrix."""
    rows = json.loads(MEASURED.read_text())["rows"].values()
    found = {
        (r["text"], r["vision"]): (r["text_bytes"] + r["vision_bytes"], r["kl"])
        for r in rows
        if "kl" in r and not r["imatrix"]
    }
    for rung in LADDER:
        size, kl = found[rung]
        assert [t for t, (s, k) in found.items() if s <= size and k <= kl] == [rung]


def test_the_ladder_has_known_types_that_need_nothing() -> None:
    assert len(set(LADDER)) == len(LADDER)
    for text, vision in LADDER:
        assert not TEXT_RECIPES[text].needs_imatrix
        assert vision in VISION_RECIPES


def test_a_sketch_is_the_file_without_its_weights(tiny_checkpoint: Path, tmp_path: Path) -> None:
    sketch = convert(tiny_checkpoint, tmp_path / "a", "q4_k_m", "q8_0", sketch=True)
    real = convert(tiny_checkpoint, tmp_path / "b", "q4_k_m", "q8_0")
    for a, b in ((sketch.text, real.text), (sketch.mmproj, real.mmproj)):
        assert read_gguf(a).tensors == read_gguf(b).tensors
        assert read_gguf(a).metadata == read_gguf(b).metadata
        assert a.stat().st_size == b.stat().st_size
        data = read_gguf(a).data_offset
        assert not any(a.read_bytes()[data:])


def test_the_first_that_fits_is_taken(tiny_checkpoint: Path, tmp_path: Path) -> None:
    asked: list[str] = []

    def memory(made: Converted) -> int:
        asked.append(made.text.stem)
        return {0: 500, 1: 400, 2: 450, 3: 100}[len(asked) - 1]

    fit = choose(tiny_checkpoint, tmp_path, 420, memory, LADDER[:4])
    assert (fit.chosen.text_type, fit.chosen.vision_type) == LADDER[1]
    assert fit.better is not None
    assert (fit.better.needed, fit.chosen.needed) == (500, 400)
    assert len(asked) == 2
    assert not list(tmp_path.iterdir())


def test_nothing_fits(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"the smallest types, q2_k and q4_k, need 3\.00 GB, more than 2\.00"
    ):
        choose(tiny_checkpoint, tmp_path, 2 * 10**9, lambda _: 3 * 10**9)


def test_the_command_explains_its_choice(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["convert", str(tiny_checkpoint), "-o", str(tmp_path), "-c", "512", "--max-pixels", "78400"]
    assert run([*command, "--fit", "4GB"]) == 0
    said = capsys.readouterr().err
    assert "bf16 and bf16:" in said
    assert "of 4.00 GB" in said
    assert (tmp_path / "tiny-BF16.gguf").is_file()
    assert run([*command, "--fit", "1MB"]) == 1
    assert "hint: take a smaller context" in capsys.readouterr().err
