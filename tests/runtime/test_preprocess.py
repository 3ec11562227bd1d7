"""pixel_values and grid_thw are those of transformers' Pillow processors, sizes those of its smart_resize."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.make_vision_golden import IMAGES, VIDEOS, sample, video_frames
from support.patterns import pattern

from qvl.runtime.errors import GGUFError, ImageError, InputError
from qvl.runtime.vision.dynamic_resolution import MAX_PIXELS, MIN_PIXELS, smart_resize
from qvl.runtime.vision.preprocess import MEAN, STD, Preprocessor

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"

sides = st.integers(1, 20_000)


@pytest.fixture(scope="module")
def reference() -> Any:
    """transformers' module of the Pillow processor."""
    pytest.importorskip("torch")
    return pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")


def within_ratio(height: int, width: int, ratio: float = 200) -> bool:
    return max(height, width) <= ratio * min(height, width)


# smart_resize


def test_sizes_equal_transformers() -> None:
    sizes = np.load(GOLDEN / "vision_images.npz")["sizes"].tolist()
    assert len(sizes) > 5000
    for height, width, low, high, *expected in sizes:
        assert smart_resize(height, width, min_pixels=low, max_pixels=high) == tuple(expected)


@pytest.mark.parity
@given(sides, sides, st.sampled_from([14, 28, 32]), st.integers(1, 10**6), st.integers(10**6, 10**8))
def test_sizes_equal_transformers_live(
    reference: Any, height: int, width: int, factor: int, low: int, high: int
) -> None:
    if not within_ratio(height, width):
        with pytest.raises(ValueError, match="aspect ratio"):
            reference.smart_resize(height, width, factor, low, high)
        with pytest.raises(ImageError, match="aspect ratio"):
            smart_resize(height, width, factor=factor, min_pixels=low, max_pixels=high)
        return
    expected = reference.smart_resize(height, width, factor, low, high)
    assert smart_resize(height, width, factor=factor, min_pixels=low, max_pixels=high) == expected


@given(sides, sides)
def test_sides_are_multiples_of_the_factor(height: int, width: int) -> None:
    if not within_ratio(height, width):
        with pytest.raises(ImageError, match="aspect ratio must be smaller than 200"):
            smart_resize(height, width)
        return
    h, w = smart_resize(height, width)
    assert h >= 28 and w >= 28 and h % 28 == 0 and w % 28 == 0


@given(st.integers(1, 20_000), st.floats(1, 4), st.booleans())
def test_area_within_bounds_and_aspect_ratio_kept(short: int, ratio: float, upright: bool) -> None:
    long = min(round(short * ratio), 4 * short)
    height, width = (long, short) if upright else (short, long)
    h, w = smart_resize(height, width)
    assert MIN_PIXELS <= h * w <= MAX_PIXELS
    # Some one scale explains both sides to within a step of the factor each.
    assert max((h - 28) / height, (w - 28) / width) <= min((h + 28) / height, (w + 28) / width)


@given(st.integers(1, 700), st.integers(1, 700))
def test_a_size_that_fits_is_kept(rows: int, columns: int) -> None:
    h, w = 28 * rows, 28 * columns
    if within_ratio(h, w) and MIN_PIXELS <= h * w <= MAX_PIXELS:
        assert smart_resize(h, w) == (h, w)


@given(sides, sides)
def test_turning_a_picture_turns_its_size(height: int, width: int) -> None:
    if within_ratio(height, width):
        assert smart_resize(height, width) == smart_resize(width, height)[::-1]


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (-3, 5)])
def test_no_size_for_nothing(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match="at least 1x1"):
        smart_resize(*size)


# Patches


@pytest.mark.parametrize("i", range(len(IMAGES)))
def test_image_equals_transformers(i: int) -> None:
    golden = np.load(GOLDEN / "vision_images.npz")
    height, width, low, high = golden["cases"][i].tolist()
    patches = Preprocessor(min_pixels=low, max_pixels=high).image(pattern(height, width, i))
    assert patches.grid_thw == tuple(golden[f"grid_{i}"].tolist())
    assert patches.pixel_values.dtype == np.float32
    assert patches.pixel_values.shape == (math.prod(patches.grid_thw), 1176)
    np.testing.assert_allclose(sample(patches.pixel_values), golden[f"values_{i}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("i", range(len(VIDEOS)))
def test_video_equals_transformers(i: int) -> None:
    golden = np.load(GOLDEN / "vision_videos.npz")
    n, height, width, low, high = golden["cases"][i].tolist()
    patches = Preprocessor(min_pixels=low, max_pixels=high).video(video_frames(n, height, width))
    assert patches.grid_thw == tuple(golden[f"grid_{i}"].tolist())
    assert patches.grid_thw[0] == (n + 1) // 2
    np.testing.assert_allclose(sample(patches.pixel_values), golden[f"values_{i}"], rtol=0, atol=1e-6)


@pytest.mark.parity
@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 9))
def test_image_equals_transformers_live(reference: Any, height: int, width: int, seed: int) -> None:
    if not within_ratio(height, width):
        return
    picture = pattern(height, width, seed)
    processor = reference.Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=100_352)
    expected = processor(images=[picture], return_tensors="np", input_data_format="channels_last")
    got = Preprocessor(max_pixels=100_352).image(picture)
    assert got.grid_thw == tuple(expected["image_grid_thw"][0])
    np.testing.assert_allclose(got.pixel_values, expected["pixel_values"], rtol=0, atol=1e-6)


def test_merge_order_by_hand() -> None:
    """Patch (row, column) of an 8x6 grid lands where 2x2 groups, row by row, put it."""
    rows, columns = 8, 6
    picture = np.zeros((rows * 14, columns * 14, 3), np.uint8)
    for row in range(rows):
        for column in range(columns):
            picture[row * 14 : row * 14 + 14, column * 14 : column * 14 + 14] = row * 16 + column
    patches = Preprocessor(mean=(0, 0, 0), std=(1, 1, 1)).image(picture)
    labels = np.rint(patches.pixel_values[:, 0] * 255).astype(int)
    order = [
        (row + dy) * 16 + column + dx
        for row in range(0, rows, 2)
        for column in range(0, columns, 2)
        for dy in (0, 1)
        for dx in (0, 1)
    ]
    assert labels.tolist() == order


def test_channel_time_row_column_within_a_patch() -> None:
    picture = pattern(56, 56)
    first = Preprocessor(mean=(0, 0, 0), std=(1, 1, 1)).image(picture).pixel_values[0]
    cube = np.rint(first.reshape(3, 2, 14, 14) * 255).astype(np.uint8)
    for time in (0, 1):
        np.testing.assert_array_equal(cube[:, time], picture[:14, :14].transpose(2, 0, 1))


def test_arrays_and_pil_images_give_the_same() -> None:
    picture = pattern(100, 120)
    preprocessor = Preprocessor()
    np.testing.assert_array_equal(
        preprocessor.image(picture).pixel_values, preprocessor.image(Image.fromarray(picture)).pixel_values
    )
    pixels = preprocessor.resize(picture)
    assert pixels.shape == (112, 112, 3) and pixels.dtype == np.uint8
    np.testing.assert_array_equal(
        preprocessor.patchify([pixels]).pixel_values, preprocessor.image(picture).pixel_values
    )


def test_a_picture_is_a_video_of_one_frame() -> None:
    picture = pattern(60, 90)
    image, video = Preprocessor().image(picture), Preprocessor().video([picture])
    assert image.grid_thw == video.grid_thw
    np.testing.assert_array_equal(image.pixel_values, video.pixel_values)


def test_frames_may_come_from_an_iterator() -> None:
    frames = video_frames(5, 60, 100)
    whole, streamed = Preprocessor().video(frames), Preprocessor().video(iter(frames))
    np.testing.assert_array_equal(whole.pixel_values, streamed.pixel_values)


def test_videos_that_are_none() -> None:
    with pytest.raises(ImageError, match="without frames"):
        Preprocessor().video([])
    with pytest.raises(ImageError, match="frame 1 is 60x56, the first 56x56"):
        Preprocessor().video([pattern(56, 56), pattern(56, 60)])


def test_tokens_of_a_size() -> None:
    assert Preprocessor().n_tokens(1792, 1792) == 4096
    assert Preprocessor().with_pixels(max_pixels=256 * 784).n_tokens(3000, 4000) <= 256


# Parameters


def test_metadata_of_an_mmproj() -> None:
    metadata = {
        "clip.vision.patch_size": 16,
        "clip.vision.spatial_merge_size": 4,
        "clip.vision.image_min_pixels": 5000,
        "clip.vision.image_max_pixels": 90_000,
        "clip.vision.image_mean": [0.5, 0.25, 0.125],
        "clip.vision.image_std": [1, 0.5, 0.25],
        "qvl.vision.temporal_patch_size": 3,
        "general.architecture": "clip",
    }
    expected = Preprocessor(16, 4, 3, 5000, 90_000, (0.5, 0.25, 0.125), (1.0, 0.5, 0.25))
    assert Preprocessor.from_metadata(metadata) == expected
    assert Preprocessor.from_metadata({}) == Preprocessor(14, 2, 2, 3136, 12_845_056, MEAN, STD)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("clip.vision.patch_size", 0),
        ("clip.vision.patch_size", True),
        ("clip.vision.patch_size", "14"),
        ("clip.vision.spatial_merge_size", -1),
        ("clip.vision.image_min_pixels", 2**40),
        ("clip.vision.image_max_pixels", 0),
        ("clip.vision.image_max_pixels", 3000),
        ("clip.vision.image_mean", [0.5, 0.5]),
        ("clip.vision.image_mean", 0.5),
        ("clip.vision.image_mean", [0.5, float("nan"), 0.5]),
        ("clip.vision.image_std", [0.5, 0.0, 0.5]),
        ("clip.vision.image_std", ["a", "b", "c"]),
    ],
)
def test_metadata_out_of_range(key: str, value: object) -> None:
    with pytest.raises(GGUFError, match=key.rsplit(".", 1)[1]):
        Preprocessor.from_metadata({key: value})


def test_bounds_can_be_overridden() -> None:
    base = Preprocessor(min_pixels=5000, max_pixels=90_000)
    assert base.with_pixels() == base
    assert base.with_pixels(6000, 80_000) == replace(base, min_pixels=6000, max_pixels=80_000)
    assert base.with_pixels(None, 80_000).min_pixels == 5000
    assert base.with_pixels(max_pixels=2000) == replace(base, min_pixels=2000, max_pixels=2000)
    assert base.with_pixels(min_pixels=10**6) == replace(base, min_pixels=10**6, max_pixels=10**6)
    for low, high in ((10_000, 9_000), (1, None), (None, 783)):
        with pytest.raises(InputError, match="pixels is"):
            base.with_pixels(low, high)
