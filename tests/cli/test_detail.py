"""Detail of the pictures in `qvl chat`, and the cost that it names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qvl.cli.chat.attachments import Attachment, attach
from qvl.cli.chat.detail import DetailPolicy
from qvl.cli.main import run
from qvl.convert import Converted
from qvl.runtime import load
from qvl.runtime.detail.bounds import LOW_TOKENS, Detail
from qvl.runtime.detail.cost import Throughput
from qvl.runtime.detail.throughput import keep_throughput, known_throughput, refined
from qvl.runtime.engine.units import VisionUnit
from qvl.runtime.measure.speed import measure
from qvl.runtime.model import Model
from qvl.runtime.prompt.messages import VisionChunk
from qvl.runtime.vision.video import load_video

LOW = LOW_TOKENS * 28 * 28


@pytest.fixture(scope="module")
def model(tiny_model: Converted) -> Iterator[Model]:
    with load(tiny_model.text, threads=1) as model:
        yield model


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "qvl" / "throughput.json"


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """1026 tokens in full."""
    path = tmp_path / "large.png"
    Image.fromarray(np.zeros((756, 1064, 3), np.uint8)).save(path)
    return path


def options_of(model: Model, detail: Detail | None, picture: Path) -> tuple[tuple[str, float], ...]:
    (attachment,) = attach([str(picture)], "image")
    return DetailPolicy(model, detail).bounded(attachment).options


def test_low_high_and_the_model_s_own(model: Model, picture: Path, cache: Path) -> None:
    assert options_of(model, "low", picture) == (("max_pixels", LOW),)
    assert options_of(model, "high", picture) == ()
    assert options_of(model, None, picture) == ()
    assert not cache.exists()  # nothing was measured for that


@pytest.mark.parametrize(("seconds", "tokens"), [(1e-6, 1026), (1e3, LOW_TOKENS)])
def test_auto_goes_by_the_throughput(model: Model, picture: Path, seconds: float, tokens: int) -> None:
    keep_throughput(model, Throughput(256, seconds, 0.0))
    bound = dict(options_of(model, "auto", picture)).get("max_pixels", 1026 * 784)
    assert bound == tokens * 784


def test_the_rate_of_videos(model: Model, tmp_path: Path) -> None:
    clip = frames(tmp_path, 4)
    assert DetailPolicy(model, "low", 1.5).bounded(clip).options == (("fps", 1.5),)
    assert DetailPolicy(model, "low").bounded(clip) == clip


@pytest.mark.parametrize("n", [40, 700])
def test_a_long_video_fills_half_the_context(model: Model, tmp_path: Path, n: int) -> None:
    keep_throughput(model, Throughput(256, 0.5, 0.0))
    clip = frames(tmp_path, n)
    for detail in (None, "high"):
        assert DetailPolicy(model, detail).bounded(clip) == clip
    policy = DetailPolicy(model, "auto")
    bounded = policy.bounded(clip)
    options = model.vision.preprocessor.sampling.given(bounded.options)
    seen = load_video(clip.path, model.vision.preprocessor, options).frames
    tokens = -(-len(seen) // 2) * seen.shape[1] * seen.shape[2] // 784
    assert model.n_ctx // 4 < tokens <= model.n_ctx // 2
    assert len(seen) == n if n == 40 else 4 <= len(seen) < n
    words = policy.describe(bounded)
    assert f"({len(seen)} frames of {seen.shape[2]} x {seen.shape[1]}: {tokens} tokens, about " in words
    assert f"; in full {n} frames of " in words
    assert policy.is_shrunk(bounded) and not policy.is_shrunk(clip)


def frames(folder: Path, n: int) -> Attachment:
    """A folder of n equal frames, which take 270 tokens each pair."""
    Image.new("RGB", (504, 420)).save(folder / "0000.png")
    for i in range(1, n):
        (folder / f"{i:04}.png").hardlink_to(folder / "0000.png")
    (clip,) = attach([str(folder)], "video")
    return clip


def test_what_is_small_is_not_measured(model: Model, tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "small.png"
    Image.fromarray(np.zeros((448, 448, 3), np.uint8)).save(path)
    assert options_of(model, "auto", path) == ()
    assert not cache.exists()


def test_the_price_is_said(model: Model, picture: Path) -> None:
    keep_throughput(model, Throughput(256, 0.5, 0.0))
    policy = DetailPolicy(model, "low")
    (attachment,) = attach([str(picture)], "image")
    words = policy.describe(policy.bounded(attachment))
    assert words.startswith("(1064 x 756, resized to 504 x 364: 234 tokens, about ")
    assert "; in full 1026 tokens, about " in words
    rows = [line.split() for line in policy.table(picture).splitlines()[1:]]
    assert [row[0] for row in rows] == ["low", "auto", "high"]
    assert [int(row[5]) for row in rows] == [234, 1026, 1026] or int(rows[1][5]) <= 1026


def test_a_kept_throughput_is_used_and_damage_falls_back_to_an_estimate(model: Model, cache: Path) -> None:
    model.vision.on_encoded = None
    measured = measure(model, sizes=[(224, 224)], n_read=64, n_write=1, repeat=1).throughput
    assert measured is not None
    assert (measured.patches, measured.encode_seconds > 0, measured.token_seconds > 0) == (256, True, True)
    estimate = known_throughput(model)
    assert not estimate.measured and not cache.exists()
    keep_throughput(model, measured)
    assert known_throughput(model) == measured
    bad = json.dumps({k: {"patches": 0} for k in json.loads(cache.read_text())})
    for damage in ("", "[]", "{", '{"a": 1}', bad):
        cache.write_text(damage)
        assert known_throughput(model) == estimate


def test_real_encodings_refine_the_throughput(model: Model, picture: Path, cache: Path) -> None:
    estimator = DetailPolicy(model, "auto").estimator
    assert not estimator.throughput.measured
    (embedding,) = model.vision.encode([str(picture)])
    assert embedding.grid_thw == (1, 54, 76)
    found, config = estimator.throughput, model.vision.config
    assert found.measured and known_throughput(model) == found
    slow = refined(found, config, found.patches, 100 * found.encode_seconds)
    assert slow.encode_seconds == pytest.approx(50.5 * found.encode_seconds)
    # a busy moment does not last: the next that is faster counts whole
    assert refined(slow, config, 1024, 1e-3).encode_seconds == pytest.approx(1e-3)
    assert refined(slow, config, 16, 1e-9) == slow  # too small to say anything


def test_a_chat_says_what_it_shrinks(
    tiny_model: Converted, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ["chat", "-m", str(tiny_model.text), "--image", str(picture), "-p", "hi", "-n", "1", "-t", "1"]
    ask += ["--json", "--no-cache"]
    assert run([*ask, "--image-detail", "low"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["usage"]["image_tokens"] == 234
    assert "resized to 504 x 364" in said.err
    assert run([*ask, "--image-detail", "high"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["usage"]["image_tokens"] == 1026
    assert said.err == ""


def test_boxes_are_read_in_the_size_that_a_picture_was_given(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (400, 300)).save(path)
    bounded = VisionChunk("image", str(path), (("max_pixels", 20_000),))
    plain = VisionChunk("image", str(path))
    sizes = [
        (unit.picture.size, unit.picture.seen, unit.picture.name)
        for chunk in (bounded, plain)
        for unit in model.store.place(chunk)
        if isinstance(unit, VisionUnit) and unit.picture is not None
    ]
    preprocessor = model.vision.preprocessor
    small = preprocessor.with_pixels(max_pixels=20_000).size(300, 400)[::-1]
    assert sizes == [
        ((400, 300), small, "a.png"),
        ((400, 300), preprocessor.size(300, 400)[::-1], "a.png"),
    ]
