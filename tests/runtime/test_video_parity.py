"""Conversations with videos against transformers in float32: 4.57 by a golden file, 5 live."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.chatml import logit_columns
from support.checkpoint import Shape, Style, write_checkpoint
from support.make_golden import fingerprint
from support.video_chats import MIN_PIXELS, VIDEO_CHATS, videos

from qvl.convert import Converted, convert
from qvl.runtime import Model, load
from qvl.runtime.engine.units import Unit, VisionUnit, n_cells
from qvl.runtime.prompt.positions import Span, TextSpan, mrope_positions
from qvl.runtime.vision.video import load_video
from qvl.runtime.vision.video_options import VideoOptions

GOLDEN = np.load(Path(__file__).parents[1] / "fixtures" / "golden" / "video.npz")
OPTIONS = VideoOptions(min_pixels=MIN_PIXELS)
SHAPES = {
    "tied": Shape(),
    "untied": Shape(hidden=192, heads=6, kv_heads=3, layers=4, tied=False, dim=96, vision_heads=8),
}


def opened(pair: Converted) -> Model:
    return load(pair.text, pair.mmproj, device="cpu", kv_type="f32", precision="exact", threads=1)


@pytest.fixture(scope="module")
def model(tiny_model: Converted) -> Iterator[Model]:
    with opened(tiny_model) as model:
        yield model


def relative(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def log_softmax(rows: NDArray[Any]) -> NDArray[np.float64]:
    shifted = rows.astype(np.float64) - rows.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def units_of(model: Model, name: str) -> list[Unit]:
    return model.template.units(VIDEO_CHATS[name], model._store.place)


def test_the_golden_file_is_of_these_weights(tiny_checkpoint: Path) -> None:
    assert np.array_equal(GOLDEN["weights"], fingerprint(tiny_checkpoint)), "make_video_golden.py writes it"


@pytest.mark.parametrize("name", VIDEO_CHATS)
def test_tokens_and_positions(model: Model, name: str) -> None:
    units, tokens = units_of(model, name), GOLDEN[f"tokens/{name}"]
    assert n_cells(units) == len(tokens)
    assert [u for u in units if isinstance(u, int)] == [
        int(t) for t in tokens if t not in (model.text.vocab.control("<|image_pad|>"),
                                            model.text.vocab.control("<|video_pad|>"))
    ]  # fmt: skip
    spans: list[Span] = [u.span if isinstance(u, VisionUnit) else TextSpan(1) for u in units]
    assert np.array_equal(mrope_positions(spans)[0], GOLDEN[f"positions/{name}"])


@pytest.mark.parametrize("name", VIDEO_CHATS)
def test_embeddings(model: Model, name: str) -> None:
    """Issue 4 asks for 5e-4."""
    for i, part in enumerate(videos(VIDEO_CHATS[name])):
        found = model.vision.encode_video(part["video"], OPTIONS)
        assert relative(found.embeddings, GOLDEN[f"embeddings/{name}/{i}"]) < 5e-6


@pytest.mark.parametrize("name", VIDEO_CHATS)
def test_logits_at_every_position(model: Model, name: str) -> None:
    """Issue 4 asks for a KL of 1e-5: here over the golden columns and the rest taken as one outcome."""
    rows = model.logits(VIDEO_CHATS[name])
    found = log_softmax(rows)[:, logit_columns(rows.shape[1])]
    p, q = np.exp(GOLDEN[f"logits/{name}"] - GOLDEN[f"log_sum/{name}"][:, None]), np.exp(found)
    p, q = (np.concatenate([x, 1 - x.sum(axis=1, keepdims=True)], axis=1) for x in (p, q))
    assert (p * np.log(p / q)).sum(axis=1).mean() < 1e-10
    assert np.array_equal(rows.argmax(axis=1), GOLDEN[f"best/{name}"])


# live ----------------------------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_videos_live(tmp_path: Path, shape: Shape) -> None:
    pytest.importorskip("torch")
    from support import video_reference as reference

    checkpoint = write_checkpoint(tmp_path / "model", shape, Style(chat_template="chatml", seed=3))
    with opened(convert(checkpoint, tmp_path, "f32", "f32")) as model:
        for name, messages in VIDEO_CHATS.items():
            for part in videos(messages):
                values, grid = reference.video_pixels(part["video"])
                frames = load_video(part["video"], model.vision.preprocessor, OPTIONS).frames
                patches = model.vision.preprocessor.patchify(frames)
                assert patches.grid_thw == tuple(grid)
                np.testing.assert_allclose(patches.pixel_values, values, rtol=0, atol=1e-6)
                found = model.vision.encode_video(part["video"], OPTIONS)
                assert relative(found.embeddings, reference.embeddings(checkpoint, part["video"])) < 5e-6
            at = GOLDEN[f"positions/{name}"]
            if name != "longer than wide":  # there transformers 5 goes on from h and w, against the paper
                assert np.array_equal(reference.positions(checkpoint, messages), at)
            p = log_softmax(reference.logits(checkpoint, messages, at))
            rows = model.logits(messages)
            assert (np.exp(p) * (p - log_softmax(rows))).sum(axis=1).mean() < 1e-10
            assert np.mean(rows.argmax(axis=1) == p.argmax(axis=1)) >= 0.999
