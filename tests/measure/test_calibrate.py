"""Importance matrices that qvl makes: what they count, and how a run goes on after a stop."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.gguf_bytes import tensor_bytes
from support.peers import run_peer

from qvl.cli.main import run
from qvl.convert import Converted, convert
from qvl.runtime.errors import Cancelled, InputError, OutputError
from qvl.runtime.find import ModelFiles
from qvl.runtime.ggml.imatrix import Imatrix, read_imatrix, write_imatrix
from qvl.runtime.measure.calibrate import CalibrationPlan, calibrate
from qvl.runtime.measure.pair import Pair
from qvl.runtime.measure.samples import Example

PICTURES = tuple(
    Example("What is this?", np.random.default_rng(i).integers(0, 256, (60, 60 + 28 * i, 3), dtype=np.uint8))
    for i in range(4)
)
MIXED = CalibrationPlan(PICTURES, "Hello there. " * 40, reply_tokens=5, chunk=32)


def files(model: Converted) -> ModelFiles:
    return ModelFiles(model.text, model.mmproj)


def equal(a: Imatrix, b: Imatrix) -> bool:
    return a.entries.keys() == b.entries.keys() and all(
        a.entries[n].count == b.entries[n].count
        and np.allclose(a.entries[n].sums, b.entries[n].sums, rtol=1e-6)
        and (p is None) == (q is None)
        and (p is None or np.allclose(p, q, rtol=1e-5, atol=1e-6 * np.abs(p).max()))
        for n in a.entries
        for p, q in [(a.entries[n].products, b.entries[n].products)]
    )


@pytest.fixture(scope="module")
def whole(tiny_model: Converted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("imatrix") / "whole.gguf"
    calibrate(files(tiny_model), MIXED, path, n_ctx=256)
    return path


def test_pictures_count_for_both_and_text_for_the_decoder(tiny_model: Converted, tmp_path: Path) -> None:
    text = calibrate(
        files(tiny_model), CalibrationPlan(text="Hello there. " * 40, chunk=32), tmp_path / "t.gguf"
    )
    assert {n.split(".")[0] for n in text.entries} == {"blk"}
    pictures = calibrate(
        files(tiny_model), CalibrationPlan(PICTURES, reply_tokens=0), tmp_path / "p.gguf", n_ctx=256
    )
    assert {n.split(".")[0] for n in pictures.entries} == {"blk", "v", "mm"}
    both = calibrate(
        files(tiny_model),
        CalibrationPlan(PICTURES, "Hello there. " * 40, reply_tokens=0, chunk=32),
        tmp_path / "b.gguf",
        n_ctx=256,
    )
    for name, entry in both.entries.items():
        parts = [e.entries[name] for e in (text, pictures) if name in e.entries]
        assert entry.count == sum(p.count for p in parts)
        np.testing.assert_allclose(entry.sums, sum(p.sums for p in parts), rtol=1e-6)


def test_replies_count(tiny_model: Converted, tmp_path: Path) -> None:
    counts = []
    for n in (0, 3):
        made = calibrate(
            files(tiny_model),
            CalibrationPlan(PICTURES[:1], reply_tokens=n),
            tmp_path / f"{n}.gguf",
            n_ctx=256,
        )
        counts.append(made.entries["blk.0.attn_q.weight"].count)
    assert 1 <= counts[1] - counts[0] <= 3


@pytest.mark.parametrize("stop", [3])
def test_a_stopped_run_goes_on(tiny_model: Converted, whole: Path, tmp_path: Path, stop: int) -> None:
    out = tmp_path / "i.gguf"

    def watch(done: int, total: int, name: str) -> None:
        if done == stop:
            raise Cancelled(name)

    with pytest.raises(Cancelled):
        calibrate(files(tiny_model), MIXED, out, n_ctx=256, save_every=2, progress=watch)
    assert read_imatrix(out).chunks == stop
    seen: list[int] = []
    calibrate(files(tiny_model), MIXED, out, n_ctx=256, progress=lambda done, total, name: seen.append(done))
    assert seen[0] == stop + 1
    assert equal(read_imatrix(out), read_imatrix(whole))
    assert not list(tmp_path.glob(".*"))


def test_another_run_is_not_overwritten(tiny_model: Converted, whole: Path, tmp_path: Path) -> None:
    out = Path(shutil.copy(whole, tmp_path / "i.gguf"))
    with pytest.raises(OutputError, match="complete"):
        calibrate(files(tiny_model), MIXED, out, n_ctx=256)
    with pytest.raises(OutputError, match="not a part of this run"):
        calibrate(files(tiny_model), CalibrationPlan(PICTURES[:2]), out, n_ctx=256)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="not a part of this run"):
        calibrate(files(tiny_model), MIXED, tmp_path / "notes.txt", n_ctx=256)
    calibrate(files(tiny_model), CalibrationPlan(PICTURES[:1]), out, n_ctx=256, force=True)
    assert read_imatrix(out).chunks == 1


def test_nothing_to_run(tiny_model: Converted, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to calibrate"):
        calibrate(files(tiny_model), CalibrationPlan(), tmp_path / "i.gguf")


def test_from_the_command_line_to_the_files(
    tiny_checkpoint: Path, tiny_model: Converted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, sample in enumerate(PICTURES[:2]):
        Image.fromarray(sample.image).save(folder / f"{i}.png")
    (tmp_path / "text.txt").write_text("Hello there. " * 20)
    out = tmp_path / "i.gguf"
    command = ["imatrix", "-m", str(tiny_model.text), "--mmproj", str(tiny_model.mmproj), "-o", str(out)]
    command += ["--images", str(folder), "--text", str(tmp_path / "text.txt"), "-n", "4", "-c", "256"]
    assert run(command) == 0
    assert read_imatrix(out).datasets == ("pictures", "text.txt")
    assert "14 matrices of the decoder" in capsys.readouterr().err
    assert read_imatrix(out).entries["blk.0.ffn_down.weight"].products is not None
    assert run([*command, "--squares-only", "--force", "-q"]) == 0
    assert all(entry.products is None for entry in read_imatrix(out).entries.values())
    assert run(["convert", str(tiny_checkpoint), "-o", str(tmp_path), "--imatrix", str(out), "-q"]) == 0
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    assert run(["imatrix", "--text", str(tmp_path / "bad.txt"), "-o", str(out)]) == 1
    assert "not a text in UTF-8 (byte 0)" in capsys.readouterr().err


def test_llama_quantize_reads_the_decoders_part(
    tiny_checkpoint: Path, tiny_model: Converted, whole: Path, tmp_path: Path
) -> None:
    """The real program, with our file: the bytes are those that our own conversion gives without products.

    These it passes over; ours with them differs where rows have whole blocks of 256.
    """
    out, squares = tmp_path / "theirs.gguf", tmp_path / "squares.gguf"
    said = run_peer("llama-quantize", "--imatrix", whole, tiny_model.text, out, "Q4_K_M")
    assert "did not find weights for blk" not in said
    found = read_imatrix(whole)
    write_imatrix(
        squares, replace(found, entries={n: replace(e, products=None) for n, e in found.entries.items()})
    )
    theirs = tensor_bytes(out)
    assert tensor_bytes(convert(tiny_checkpoint, tmp_path, "q4_k_m", "q8_0", squares).text) == theirs
    ours = tensor_bytes(convert(tiny_checkpoint, tmp_path, "q4_k_m", "q8_0", whole, force=True).text)
    assert {n for n in ours if ours[n] != theirs[n]} == {n for n in ours if "ffn_down" in n}


def test_llama_imatrix_finds_the_same(tiny_model: Converted, tmp_path: Path) -> None:
    """The real program on the same text: the same sums."""
    text = "Hello there, the quick brown fox jumps over the lazy dog. " * 20
    (tmp_path / "t.txt").write_text(text)
    out = tmp_path / "theirs.gguf"
    run_peer(
        "llama-imatrix", "-m", tiny_model.text, "-f", tmp_path / "t.txt", "-o", out, "-c", 64, "--no-ppl"
    )
    theirs = read_imatrix(out)
    n_chunks = theirs.entries["blk.0.attn_q.weight"].count // 64
    # it leaves out the tokens after the last whole piece
    with Pair(ModelFiles(tiny_model.text, None), n_ctx=128) as pair:
        tokens = pair.text.vocab.tokenize(text)
        assert n_chunks == len(tokens) // 64
        same = pair.text.vocab.detokenize(tokens[: n_chunks * 64])
    ours = calibrate(files(tiny_model), CalibrationPlan(text=same, chunk=64), tmp_path / "ours.gguf")
    assert ours.entries.keys() == theirs.entries.keys()
    for name, entry in ours.entries.items():
        assert entry.count == theirs.entries[name].count
        expected = theirs.entries[name].sums
        # attention goes through float16, in batches of another size
        assert np.abs(entry.sums - expected).max() < 2e-3 * expected.max(), name
