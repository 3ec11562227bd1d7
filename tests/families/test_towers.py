"""The vision towers of Qwen2.5-VL, Qwen3-VL and Qwen-VL: against transformers and torch, and damaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.patterns import pattern
from support.tower_shapes import GOLDEN_SHAPES, GOLDEN_SIZES, SHAPES, noise, preprocessor
from support.towers import TowerShape, write_tower

from qvl.runtime.errors import GGUFError
from qvl.runtime.families.qwen2_5_vl.tower import windows
from qvl.runtime.families.qwen3_vl.tower import interpolation
from qvl.runtime.families.table import named
from qvl.runtime.ggml.gguf import read_gguf
from qvl.runtime.measure.activations import InputSums, as_stored, in_encoder
from qvl.runtime.vision.attention import TiledAttention
from qvl.runtime.vision.encoder import VisionEncoder
from qvl.runtime.vision.layers import Exact

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden" / "towers.npz"
TOLERANCE = 5e-6
SIZES = [
    (32, 32), (56, 56), (57, 83), (112, 112), (224, 224), (448, 448), (500, 500), (28, 56), (28, 560),
    (560, 28), (1400, 28), (400, 1600), (1600, 400), (333, 1000), (240, 320), (480, 640), (97, 101),
    (13, 57), (3, 90), (90, 3), (84, 1000), (150, 151), (299, 299), (720, 200), (644, 868), (113, 225),
    (336, 112), (340, 120), (120, 340), (64, 960),
]  # fmt: skip

Open = Callable[[str], VisionEncoder]


def relative(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    """Encoders by the names of SHAPES, in float32 on the CPU."""
    folder = tmp_path_factory.mktemp("towers")
    encoders: list[VisionEncoder] = []

    @cache
    def opening(name: str) -> VisionEncoder:
        shape = SHAPES[name]
        path = write_tower(folder / f"{len(encoders)}.gguf", shape)
        encoders.append(VisionEncoder(path, device="cpu"))
        encoders[-1].preprocessor = preprocessor(shape)
        return encoders[-1]

    yield opening
    for encoder in encoders:
        encoder.close()


@pytest.mark.parametrize("size", GOLDEN_SIZES, ids=str)
@pytest.mark.parametrize("name", GOLDEN_SHAPES)
def test_embeddings_are_those_of_the_reference(name: str, size: tuple[int, int], opened: Open) -> None:
    [found] = opened(name).encode([pattern(*size)])
    expected = np.load(GOLDEN)[f"{name} {size[0]}x{size[1]}"]
    assert found.n_tokens == np.prod(found.merged)
    assert relative(found.embeddings, expected) < TOLERANCE


@pytest.mark.parity
@pytest.mark.parametrize("name", SHAPES)
def test_parity_over_sizes(name: str, opened: Open) -> None:
    pytest.importorskip("torch")
    from support.tower_reference import reference

    encoder, expected = opened(name), reference(SHAPES[name])
    sizes = SIZES if not encoder.preprocessor.side else SIZES[::5]
    for height, width in sizes:
        patches = encoder.preprocessor.image(pattern(height, width))
        [found] = encoder.encode_patches([patches])
        rows = expected(patches.pixel_values, [patches.grid_thw])
        assert relative(found.embeddings, rows) < TOLERANCE, (height, width)


@pytest.mark.parity
@pytest.mark.parametrize("name", SHAPES)
def test_parity_of_videos_and_packs(name: str, opened: Open) -> None:
    pytest.importorskip("torch")
    from support.tower_reference import reference

    encoder = opened(name)
    inputs = noise(SHAPES[name], (1, 2, 2), (5, 10, 18), (1, 8, 8), (2, 10, 18), (3, 4, 6), (1, 34, 4))
    found = np.concatenate([e.embeddings for e in encoder.encode_patches(inputs)])
    pixels = np.concatenate([p.pixel_values for p in inputs])
    assert relative(found, reference(SHAPES[name])(pixels, [p.grid_thw for p in inputs])) < TOLERANCE


@pytest.mark.parity
def test_windows_are_those_of_transformers() -> None:
    torch = pytest.importorskip("torch")
    from transformers.vision_utils import get_vision_window_index

    rng = np.random.default_rng(0)
    for _ in range(200):
        grids = [tuple(int(x) for x in rng.integers(1, [3, 14, 14]) * [1, 2, 2]) for _ in range(3)]
        order, runs = windows(grids, 4, 2)  # type: ignore[arg-type]
        index, ends = get_vision_window_index(torch.tensor(grids), 2, 112, 14)
        cuts = np.cumsum([size // 4 for count, size in runs for _ in range(count)])[:-1]
        ours = {frozenset(part.tolist()) for part in np.split(order, cuts)}
        assert ours == {frozenset(p.tolist()) for p in np.split(index.numpy(), ends.numpy()[1:-1] // 4)}


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 11), st.integers(1, 11)), min_size=1, max_size=3))
def test_windows_part_the_frames(merged: list[tuple[int, int, int]]) -> None:
    order, runs = windows([(t, 2 * h, 2 * w) for t, h, w in merged], 4, 2)
    places = [
        (i, f, y // 4, x // 4)
        for i, (t, h, w) in enumerate(merged)
        for f in range(t)
        for y in range(h)
        for x in range(w)
    ]
    assert sorted(order.tolist()) == list(range(len(places)))
    sizes = [size // 4 for count, size in runs for _ in range(count)]
    parts = np.split(order, np.cumsum(sizes)[:-1])
    assert all(len({places[i] for i in part}) == 1 for part in parts)
    assert len(parts) == len(set(places))
    assert sizes == sorted(sizes, reverse=True) and len(runs) == len({size for _, size in runs})


@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(1, 48))
def test_interpolation_spans_the_table_corner_to_corner(t: int, h: int, w: int, side: int) -> None:
    indices, shares = interpolation([(t, 2 * h, 2 * w)], side, 2)
    assert indices.shape == shares.shape == (4, 4 * t * h * w)
    assert indices.min() >= 0 and indices.max() < side**2
    assert np.allclose(shares.sum(axis=0), 1, atol=1e-5) and shares.min() >= -1e-6
    rows, columns = (indices // side * shares).sum(axis=0), (indices % side * shares).sum(axis=0)
    for place, n in ((rows, 2 * h), (columns, 2 * w)):
        step = (side - 1) / max(n - 1, 1)
        assert np.allclose(
            np.unique(np.round(place / step) if side > 1 else place), np.arange(n) if side > 1 else 0
        )
        assert place.min() >= -1e-4 and place.max() <= side - 1 + 1e-3


@pytest.mark.parametrize("name", GOLDEN_SHAPES)
def test_packing_and_frames_change_nothing(name: str, opened: Open) -> None:
    encoder = opened(name)
    inputs = noise(SHAPES[name], (1, 10, 6), (3, 4, 6), (1, 8, 8), (1, 2, 2))
    for patches, found in zip(inputs, encoder.encode_patches(inputs), strict=True):
        n = patches.grid_thw[1] * patches.grid_thw[2]
        for frame in range(patches.grid_thw[0]):
            part = patches.pixel_values[frame * n : (frame + 1) * n]
            [alone] = encoder.encode_patches([type(patches)(part, (1, *patches.grid_thw[1:]))])
            assert relative(found.embeddings[frame * n // 4 : (frame + 1) * n // 4], alone.embeddings) < 2e-6


@pytest.mark.parametrize("name", GOLDEN_SHAPES)
def test_tiles_attend_as_flash_does(name: str, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = opened(name)
    inputs = noise(SHAPES[name], (1, 16, 18), (2, 6, 8))
    expected = encoder.encode_patches(inputs)
    monkeypatch.setattr(encoder, "_layers", Exact(encoder._weights, TiledAttention(tile_bytes=1 << 15)))
    monkeypatch.setattr(encoder, "_last", None)
    for one, other in zip(encoder.encode_patches(inputs), expected, strict=True):
        assert relative(one.embeddings, other.embeddings) < 2e-6
    monkeypatch.setattr(encoder, "_last", None)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("name", GOLDEN_SHAPES)
def test_half_precision_is_near(name: str, dtype: type, tmp_path: Path) -> None:
    shape = SHAPES[name]
    with VisionEncoder(write_tower(tmp_path / "tower.gguf", shape, dtype), device="cpu") as encoder:
        encoder.preprocessor = preprocessor(shape)
        [found] = encoder.encode([pattern(*GOLDEN_SIZES[-1])])
    expected = np.load(GOLDEN)[f"{name} {GOLDEN_SIZES[-1][0]}x{GOLDEN_SIZES[-1][1]}"]
    assert relative(found.embeddings, expected) < (TOLERANCE if dtype is np.float32 else 2e-2)


def test_an_unknown_projector_is_refused_by_name(tmp_path: Path) -> None:
    from support.gguf_edit import edit

    path = write_tower(tmp_path / "tower.gguf", TowerShape("qwen3_vl", depth=1, deepstack=()))
    edit(path, tmp_path / "other.gguf", metadata={"clip.projector_type": "pixtral"})
    with pytest.raises(GGUFError, match=r"other\.gguf.*'pixtral'.*'qwen3vl_merger' \(Qwen3-VL\)"):
        VisionEncoder(tmp_path / "other.gguf")


WRONG: list[tuple[str, str, Any]] = [
    *(
        (family, "attention.layer_norm_epsilon", value)
        for family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen_vl")
        for value in (-1e-6, float("nan"), float("inf"), 0.0, 2.0)
    ),
    ("qwen2_5_vl", "n_wa_pattern", 0), ("qwen2_5_vl", "window_size", 27),
    ("qwen2_5_vl", "window_size", 1 << 30),
    ("qwen2_5_vl", "block_count", 0), ("qwen2_5_vl", "block_count", 1 << 20),
    ("qwen2_5_vl", "patch_size", 7000),
    ("qwen2_5_vl", "attention.head_count", 0), ("qwen2_5_vl", "attention.head_count", 3),
    ("qwen2_5_vl", "embedding_length", 0), ("qwen2_5_vl", "spatial_merge_size", 3),
    ("qwen3_vl", "is_deepstack_layers", [True]), ("qwen3_vl", "is_deepstack_layers", [1, 0, 0, 0]),
    ("qwen3_vl", "is_deepstack_layers", 1), ("qwen3_vl", "image_mean", [0.5, 0.5]),
    ("qwen3_vl", "image_std", [0.0, 0.5, 0.5]), ("qwen3_vl", "patch_size", "16"),
    ("qwen_vl", "projector.query_side", 15), ("qwen_vl", "projector.query_side", 0),
    ("qwen_vl", "projector.head_count", 0), ("qwen_vl", "image_size", 450), ("qwen_vl", "image_size", 0),
]  # fmt: skip


@pytest.mark.parametrize(("family", "key", "value"), WRONG)
def test_metadata_out_of_range_is_refused(family: str, key: str, value: Any, tmp_path: Path) -> None:
    shape = TowerShape(family, depth=4, deepstack=(1,), size=112, table=4)
    path = write_tower(tmp_path / "tower.gguf", shape, **{key: value})
    with pytest.raises(GGUFError, match=r"tower\.gguf: .*expected"):
        VisionEncoder(path)


@pytest.mark.parametrize("name", GOLDEN_SHAPES)
def test_statistics_cover_every_matrix_of_the_file(
    name: str, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, sums = opened(name), InputSums(in_encoder, products=False)
    monkeypatch.setattr(encoder, "observer", sums)
    encoder.encode([pattern(*GOLDEN_SIZES[-1])])
    found = as_stored(sums.flush(), encoder.stored)
    tensors = read_gguf(encoder.path).tensors
    matrices = {n: t.shape[1] for n, t in tensors.items() if len(t.shape) == 2 and n.endswith(".weight")}
    matrices.pop("v.position_embd.weight", None)
    assert {n: len(entry.sums) for n, entry in found.items()} == matrices


@pytest.mark.parametrize("name", GOLDEN_SHAPES)
def test_memory_and_work_of_a_picture_are_known(name: str, opened: Open) -> None:
    encoder = opened(name)
    grid = encoder.preprocessor.grid(300, 400)
    assert 0 < encoder.planned_bytes(grid) < 1 << 30
    one, four = (encoder.config.operations(n) for n in (1024, 4096))
    assert 0 < 3.99 * one.products < four.products < 4.01 * one.products
    assert four.attention >= 3.99 * one.attention > 0


@pytest.mark.parity
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_pixel_values_are_those_of_transformers(family: str) -> None:
    pytest.importorskip("torch")
    from PIL import Image
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    own = named(family).tower.PREPROCESSOR
    theirs = Qwen2VLImageProcessorPil(
        patch_size=own.patch_size,
        image_mean=list(own.mean),
        image_std=list(own.std),
        size={"shortest_edge": own.min_pixels, "longest_edge": own.max_pixels},
    )
    for height, width in ((20, 40), (224, 224), (300, 451), (640, 480), (97, 900)):
        picture = Image.fromarray(pattern(height, width))
        found, expected = own.image(picture), theirs(images=[picture], return_tensors="np")
        assert [found.grid_thw] == [tuple(grid) for grid in expected["image_grid_thw"].tolist()]
        assert np.abs(found.pixel_values - expected["pixel_values"]).max() < 1e-6


def test_qwen_vl_stretches_to_its_square() -> None:
    from PIL import Image

    own = named("qwen_vl").tower.PREPROCESSOR
    assert own.size(3000, 20) == (448, 448) and own.n_tokens(3000, 20) == 256
    picture = Image.fromarray(pattern(300, 451))
    found = own.image(picture)
    assert found.grid_thw == (1, 32, 32)
    stretched = np.asarray(picture.resize((448, 448), Image.Resampling.BICUBIC), np.float64) / 255
    values = ((stretched - own.mean) / own.std).transpose(2, 0, 1)
    cut = values.reshape(3, 16, 2, 14, 16, 2, 14).transpose(1, 4, 2, 5, 0, 3, 6).reshape(1024, 588)
    assert np.abs(found.pixel_values - cut).max() < 1e-6
