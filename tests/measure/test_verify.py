"""`qvl verify`: a model against itself, against coarser ones, and against transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.checkpoint import Shape, Style, write_checkpoint

from qvl.cli.main import run
from qvl.convert import Converted, convert
from qvl.runtime.errors import InputError
from qvl.runtime.find import ModelFiles
from qvl.runtime.ggml.gguf import read_gguf
from qvl.runtime.ggml.gguf_writer import splice
from qvl.runtime.measure.pair import Pair
from qvl.runtime.measure.samples import Example
from qvl.runtime.measure.verify import PARTS, Report, verify

SAMPLES = (
    Example("What is this?", np.random.default_rng(1).integers(0, 256, (70, 120, 3), dtype=np.uint8)),
    Example("Hello"),
)


def opened(made: Converted) -> Pair:
    return Pair(ModelFiles(made.text, made.mmproj), n_ctx=256, device="cpu")


def compared(model: Converted, reference: Converted, samples: Sequence[Example] = SAMPLES) -> Report:
    with opened(model) as m, opened(reference) as r:
        return verify(m, r, samples, max_tokens=8)


@pytest.fixture(scope="module")
def coarse(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Converted:
    return convert(tiny_checkpoint, tmp_path_factory.mktemp("coarse"), "q4_0", "q4_0")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    pixels = np.random.default_rng(2).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    return folder


def test_a_model_loses_nothing_against_itself(tiny_model: Converted) -> None:
    report = compared(tiny_model, tiny_model)
    assert report.vision is not None
    assert report.vision.relative == 0
    for found in (report.decoder, report.together, *report.parts.values()):
        assert (found.kl_max, found.top1, found.perplexity_change) == (0, 1, 0)
    assert [a.parted for a in report.answers] == [None, None]
    assert all(1 <= a.tokens <= 8 for a in report.answers)


def test_each_part_is_found_out(tiny_model: Converted, coarse: Converted, tmp_path: Path) -> None:
    """A model with one coarse part: that part costs what the whole does, and the others nothing."""
    for part in PARTS:
        base, donor = (getattr(m, part.file) for m in (tiny_model, coarse))
        path = tmp_path / f"{part.name}.gguf"
        splice(read_gguf(base), read_gguf(donor), part.taken, path)
        model = Converted(
            path if part.file == "text" else tiny_model.text,
            path if part.file == "mmproj" else tiny_model.mmproj,
        )
        report = compared(model, tiny_model)
        for name, found in report.parts.items():
            assert (found.kl_mean > 0) == (name == part.name)
        assert report.parts[part.name].kl_mean == report.together.kl_mean
        assert (report.decoder.kl_mean > 0) == (part.file == "text")
        assert report.vision is not None
        assert (report.vision.relative > 0) == (part.file == "mmproj")


def test_parts_cover_every_tensor_once(tiny_model: Converted) -> None:
    for file in ("text", "mmproj"):
        for name in read_gguf(getattr(tiny_model, file)).tensors:
            assert sum(part.taken(name) for part in PARTS if part.file == file) == 1, name


def test_a_spliced_file_holds_both(tiny_model: Converted, coarse: Converted, tmp_path: Path) -> None:
    base, donor = read_gguf(tiny_model.text), read_gguf(coarse.text)
    splice(base, donor, lambda name: "ffn_up" in name, tmp_path / "s.gguf")
    made = read_gguf(tmp_path / "s.gguf")
    assert made.metadata == base.metadata
    assert list(made.tensors) == list(base.tensors)
    for name, info in made.tensors.items():
        source = donor if "ffn_up" in name else base
        theirs = source.tensors[name]
        assert (info.type, info.shape) == (theirs.type, theirs.shape)
        a, b = (
            f.path.read_bytes()[t.offset : t.offset + t.nbytes] for f, t in ((made, info), (source, theirs))
        )
        assert a == b


def test_models_of_other_sizes_cannot_be_compared(tiny_model: Converted, tmp_path: Path) -> None:
    other = convert(write_checkpoint(tmp_path / "o", Shape(layers=3)), tmp_path, "f32", "f32")
    with pytest.raises(InputError, match=r"not the same decoder: blk\.2\."):
        compared(other, tiny_model)
    with (
        Pair(ModelFiles(tiny_model.text, None), n_ctx=256) as text,
        opened(tiny_model) as whole,
        pytest.raises(InputError, match="only one of"),
    ):
        verify(text, whole, SAMPLES)


def test_another_model_is_refused_at_the_command_line(
    tiny_model: Converted, nano: Callable[[str, str], Converted], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of another width, and with other tokens; either way round."""
    pairs = [str(m.text.parent) for m in (tiny_model, nano("f32", "f32"))]
    for model, reference in (pairs, pairs[::-1]):
        assert run(["verify", model, "--against", reference, "--limit", "1"]) == 1
        out, err = capsys.readouterr()
        assert not out
        assert "not the same decoder" in err
        assert "hint: compare files that were made from one checkpoint" in err


def test_the_same_shapes_with_other_tokens_are_refused(tiny_model: Converted, tmp_path: Path) -> None:
    style = Style(tokenizer="bytes")
    other = convert(write_checkpoint(tmp_path / "o", Shape(), style), tmp_path, "f32", "f32")
    with pytest.raises(InputError, match="have different tokens"):
        compared(other, tiny_model)


def test_text_alone(tiny_model: Converted, coarse: Converted) -> None:
    with (
        Pair(ModelFiles(coarse.text, None), n_ctx=256) as m,
        Pair(ModelFiles(tiny_model.text, None), n_ctx=256) as r,
    ):
        report = verify(m, r, [Example("Hello")], max_tokens=4)
        assert report.vision is None
        assert list(report.parts) == ["decoder", "embeddings and head"]
        assert report.decoder == report.together
        with pytest.raises(InputError, match="no mmproj"):
            verify(m, r, SAMPLES)


def arguments(model: Converted, reference: Converted, pictures: Path) -> list[str]:
    return [
        "verify", str(model.text), "--mmproj", str(model.mmproj), "--against", str(reference.text),
        "--against-mmproj", str(reference.mmproj), "--images", str(pictures), "-n", "4", "-c", "256",
    ]  # fmt: skip


def test_the_command(
    tiny_model: Converted, coarse: Converted, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*arguments(coarse, tiny_model, pictures), "--json", "--max-kl", "1e-12"]) == 1
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    kl = report["together"]["kl_mean"]
    assert kl > 1e-12
    assert f"error: mean KL is {kl:.3g}, expected at most 1e-12" in printed.err
    assert set(report["parts"]) == {part.name for part in PARTS}

    assert run([*arguments(coarse, tiny_model, pictures), "--no-parts", "--max-kl", str(kl)]) == 0
    out = capsys.readouterr().out
    assert f"{kl:.2e}" in out
    assert "one part of the model" not in out


@pytest.mark.parity
def test_our_float32_is_transformers(
    tiny_model: Converted, tiny_checkpoint: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    command = ["verify", str(tiny_model.text), "--mmproj", str(tiny_model.mmproj), "-c", "256", "-n", "16"]
    command += ["--against", str(tiny_checkpoint), "--images", str(pictures), "--json"]
    assert run([*command, "--max-kl", "1e-5"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["vision"]["relative"] < 1e-5
    assert report["together"]["top1"] == 1
    assert report["reference"] == "tiny in transformers"
