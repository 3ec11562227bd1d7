"""The image encoder: against transformers, and against itself in other packings and on other devices."""

from __future__ import annotations

import ctypes
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.checkpoint import Shape, Style, write_checkpoint
from support.patterns import pattern

from qvl.convert import Converted, convert
from qvl.runtime.errors import BackendError, Cancelled, GGUFError, InputError
from qvl.runtime.ggml import library as ggml
from qvl.runtime.native import kernels, levels
from qvl.runtime.vision.attention import FlashAttention, TiledAttention
from qvl.runtime.vision.encoder import VisionEncoder
from qvl.runtime.vision.grid import segments
from qvl.runtime.vision.layers import Exact
from qvl.runtime.vision.preprocess import Patches
from qvl.runtime.vision.rope_2d import rotary_positions

NANO = Path(__file__).parents[2] / "models" / "nano"
GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden" / "encoder.npz"
SHAPES = {
    "two heads": Shape(),
    "one head, deep": Shape(dim=32, vision_heads=1, depth=7),
    "head of 80": Shape(dim=160, vision_heads=2, depth=3),
    "many heads, untied": Shape(hidden=192, heads=6, dim=96, vision_heads=8, tied=False, mlp_ratio=2),
}
SIZES = [
    (28, 28), (56, 56), (57, 83), (112, 112), (224, 224), (448, 448), (500, 500), (700, 700), (28, 56),
    (28, 560), (28, 1400), (560, 28), (1400, 28), (56, 2800), (400, 1600), (1600, 400), (333, 1000),
    (1000, 333), (240, 320), (480, 640), (640, 480), (97, 101), (13, 57), (3, 90), (90, 3), (84, 1000),
    (150, 151), (299, 299), (720, 200), (644, 868),
]  # fmt: skip


def relative(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def noise(*grids: tuple[int, int, int]) -> list[Patches]:
    rng = np.random.default_rng(1)
    return [Patches(rng.standard_normal((t * h * w, 1176), dtype=np.float32), (t, h, w)) for t, h, w in grids]


@pytest.fixture(scope="module")
def encoder(tiny_model: Converted) -> Iterator[VisionEncoder]:
    with VisionEncoder(tiny_model.mmproj, device="cpu") as found:
        yield found


@pytest.mark.parametrize("size", sorted(np.load(GOLDEN)))
def test_embeddings_are_those_of_transformers(encoder: VisionEncoder, size: str) -> None:
    height, width = map(int, size.split("x"))
    [found] = encoder.encode([pattern(height, width)])
    assert relative(found.embeddings, np.load(GOLDEN)[size]) < 5e-6


@pytest.mark.parity
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_parity_over_sizes(shape: Shape, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from support.reference import vision_embeddings

    checkpoint = write_checkpoint(tmp_path / "model", shape)
    with VisionEncoder(convert(checkpoint, tmp_path, "f32", "f32").mmproj, device="cpu") as encoder:
        for height, width in SIZES:
            patches = encoder.preprocessor.image(pattern(height, width))
            [found] = encoder.encode_patches([patches])
            expected = vision_embeddings(checkpoint, patches.pixel_values, [patches.grid_thw])
            assert relative(found.embeddings, expected) < 5e-6, (height, width)


@pytest.mark.parity
@pytest.mark.skipif(kernels() is None, reason="no kernels of ours for this CPU, or they are not compiled")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("vision_type", ["f16", "bf16"])
def test_fast_is_as_true_as_transformers_in_bfloat16(shape: Shape, vision_type: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from support.reference import vision_embeddings

    checkpoint = write_checkpoint(tmp_path / "model", shape, Style(dtype="BF16"))
    ours, theirs = [], []
    with VisionEncoder(convert(checkpoint, tmp_path, "f16", vision_type).mmproj, device="cpu") as encoder:
        assert encoder.precision != "exact"
        for height, width in SIZES[1:20:3]:
            patches = encoder.preprocessor.image(pattern(height, width))
            args = checkpoint, patches.pixel_values, [patches.grid_thw]
            expected = vision_embeddings(*args)
            ours.append(relative(encoder.encode_patches([patches])[0].embeddings, expected))
            theirs.append(relative(vision_embeddings(*args, torch.bfloat16), expected))
    assert all(a <= b for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


def test_packing_changes_nothing(encoder: VisionEncoder) -> None:
    inputs = noise((1, 8, 8), (1, 8, 8), (3, 4, 6), (1, 2, 2), (1, 10, 6))
    together = encoder.encode_patches(inputs)
    for patches, found in zip(inputs, together, strict=True):
        [alone] = encoder.encode_patches([patches])
        assert found.grid_thw == patches.grid_thw
        assert relative(found.embeddings, alone.embeddings) < 1e-6


def test_frames_do_not_see_each_other(encoder: VisionEncoder) -> None:
    [video] = noise((2, 6, 4))
    changed = Patches(video.pixel_values.copy(), video.grid_thw)
    changed.pixel_values[24:] *= -1
    [before], [after] = encoder.encode_patches([video]), encoder.encode_patches([changed])
    assert np.array_equal(before.embeddings[:6], after.embeddings[:6])
    assert not np.allclose(before.embeddings[6:], after.embeddings[6:])


def test_plans_leave_the_encoder_usable(encoder: VisionEncoder) -> None:
    """Planned for the same shape and for others: ggml keeps plans whose memory it never took."""
    inputs = noise((1, 4, 6))
    others = [*noise((1, 8, 8)), *inputs]
    before = encoder.encode_patches(inputs)[0].embeddings
    assert encoder.planned_bytes((1, 128, 128)) > encoder.planned_bytes((1, 4, 6))
    assert np.array_equal(encoder.encode_patches(inputs)[0].embeddings, before)
    encoder.planned_bytes((1, 8, 8))
    assert relative(encoder.encode_patches(others)[1].embeddings, before) < 1e-6
    encoder.planned_bytes((1, 4, 6))
    assert np.array_equal(encoder.encode_patches(inputs)[0].embeddings, before)


@pytest.mark.parametrize("kind", [ggml.Type.F32, ggml.Type.F16, ggml.Type.BF16])
def test_tiles_attend_as_flash_does(
    encoder: VisionEncoder, kind: ggml.Type, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = noise((1, 16, 18), (2, 6, 8))
    expected = encoder.encode_patches(inputs)
    tiles = TiledAttention(kind, tile_bytes=64 * 288 * 32, multiple=24)
    monkeypatch.setattr(encoder, "_layers", Exact(encoder._weights, tiles))
    monkeypatch.setattr(encoder, "_last", None)
    tolerance = {ggml.Type.F32: 1e-6, ggml.Type.F16: 1e-3, ggml.Type.BF16: 5e-3}[kind]
    for one, other in zip(encoder.encode_patches(inputs), expected, strict=True):
        assert relative(one.embeddings, other.embeddings) < tolerance


def test_progress_rises_and_can_stop(encoder: VisionEncoder) -> None:
    seen: list[float] = []
    encoder.encode_patches(noise((1, 8, 8), (1, 64, 64)), progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(1)
    assert len(seen) == 2 * encoder.config.n_layer
    with pytest.raises(Cancelled):
        encoder.encode_patches(noise((1, 8, 8)), progress=lambda done: False)
    assert len(encoder.encode_patches(noise((1, 8, 8)))) == 1


def test_threads_may_share_an_encoder(encoder: VisionEncoder) -> None:
    inputs = [noise((1, 4, 2 * n)) for n in range(1, 9)]
    expected = [encoder.encode_patches(one)[0].embeddings for one in inputs]
    found: dict[int, NDArray[np.float32]] = {}

    def work(i: int) -> None:
        found[i] = encoder.encode_patches(inputs[i])[0].embeddings

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(found[i], expected[i]) for i in range(8))


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=4))
def test_positions_follow_merge_order(merged: list[tuple[int, int, int]]) -> None:
    grids = [(t, 2 * h, 2 * w) for t, h, w in merged]
    expected = [
        (2 * y + dy, 2 * x + dx)
        for t, h, w in merged
        for _ in range(t)
        for y in range(h)
        for x in range(w)
        for dy in range(2)
        for dx in range(2)
    ]
    found = rotary_positions(grids)
    n = len(expected)
    assert list(zip(found[:n].tolist(), found[n : 2 * n].tolist(), strict=True)) == expected
    assert not found[2 * n :].any()
    assert sum(count * size for count, size in segments(grids)) == n


def test_memory_is_linear_in_patches(encoder: VisionEncoder) -> None:
    sizes = []
    for side in (64, 128):
        encoder.encode_patches(noise((1, side, side)))
        sizes.append(encoder.buffer_bytes)
    assert sizes[1] < 4.2 * sizes[0]


def test_a_device_gives_the_same_embeddings(
    encoder: VisionEncoder, tiny_model: Converted, rpc_endpoint: str
) -> None:
    inputs = noise((1, 8, 8), (2, 4, 6))
    expected = encoder.encode_patches(inputs)
    with VisionEncoder(tiny_model.mmproj, device=f"rpc:{rpc_endpoint}") as remote:
        assert remote.device.name.startswith("RPC")
        assert not remote.device.is_cpu
        remote._layers = Exact(remote._weights, FlashAttention())  # float32, as on the CPU
        for one, other in zip(remote.encode_patches(inputs), expected, strict=True):
            assert np.array_equal(one.embeddings, other.embeddings)


def test_the_text_file_is_no_mmproj(tiny_model: Converted) -> None:
    with pytest.raises(GGUFError, match=r"architecture 'qwen2vl'.*expected 'clip'"):
        VisionEncoder(tiny_model.text)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_damage_reaches_an_assertion(data: st.DataObject, damaged: Path, tiny_model: Converted) -> None:
    raw = bytearray(tiny_model.mmproj.read_bytes()[:20000])
    rest = tiny_model.mmproj.read_bytes()[20000:]
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(4, 12000))
        raw[at : at + 4] = data.draw(st.binary(min_size=4, max_size=4))
    damaged.write_bytes(bytes(raw) + rest[: data.draw(st.sampled_from([len(rest), len(rest) - 1, 1000, 0]))])
    try:
        with VisionEncoder(damaged, device="cpu") as encoder:
            encoder.encode_patches(noise((1, 4, 4)))
    except (GGUFError, InputError, BackendError):
        pass


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged") / "mmproj.gguf"


def test_mapped_and_copied_weights_agree(
    encoder: VisionEncoder, tiny_model: Converted, tmp_path: Path
) -> None:
    copied = tmp_path / "copy.gguf"
    shutil.copyfile(tiny_model.mmproj, copied)
    with VisionEncoder(copied, device="cpu") as other:
        base = ctypes.c_void_p(ggml.tensor(other._weights["v.blk.0.attn_out.weight"]).data)
        assert base.value
        inputs = noise((1, 6, 6))
        expected = encoder.encode_patches(inputs)[0].embeddings
        assert np.array_equal(other.encode_patches(inputs)[0].embeddings, expected)


@pytest.mark.parametrize("nodes", [1, 7, 1000])
def test_a_few_layers_at_a_time_give_the_same(
    encoder: VisionEncoder, nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, wherever the graph is cut."""
    inputs = noise((1, 8, 8), (1, 64, 64), (2, 12, 6))
    expected = encoder.encode_patches(inputs)
    monkeypatch.setattr("qvl.runtime.ggml.scheduler._FIRST_NODES", nodes)
    monkeypatch.setattr("qvl.runtime.ggml.scheduler._PIECE_SECONDS", 0.0 if nodes == 1 else 1e9)
    steps, shares = encoder.encode_steps(inputs), []
    while True:
        try:
            shares.append(next(steps))
        except StopIteration as end:
            found = end.value
            break
    assert shares == sorted(shares) and shares[-1] == 1.0 and (len(shares) > 50) == (nodes == 1)
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one.embeddings, other.embeddings)


@pytest.mark.parametrize("level", ["0", *levels()])
def test_memory_of_16384_patches_grows_with_their_number(
    level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest picture is planned, not encoded: all scores at once would take 16 times those of 4096."""
    monkeypatch.setenv("QVL_NATIVE", level)
    mmproj = convert(write_checkpoint(tmp_path / "model", Shape()), tmp_path, "f16", "q8_0").mmproj
    with VisionEncoder(mmproj, device="cpu") as encoder:
        assert (encoder.precision == "exact") == (level == "0")
        [before] = encoder.encode_patches(noise((1, 2, 2)))
        few, many = (encoder.planned_bytes((1, side, side)) for side in (64, 128))
        assert few < many < 4.2 * few
        [after] = encoder.encode_patches(noise((1, 2, 2)))
        assert np.array_equal(before.embeddings, after.embeddings)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("source", "vision_type"),
    [("random", kind) for kind in ("q8_0", "q6_k", "q5_k", "q4_k")] + [("embedded", "q8_0")],
)
def test_quantized_types_lose_no_more_than_by_ggml(
    source: str, vision_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    from support.reference import vision_embeddings

    # as many inputs as a K-quant's block has, in every matrix
    checkpoint = NANO
    if source == "random":
        checkpoint = write_checkpoint(tmp_path / "model", Shape(dim=256, vision_heads=4, depth=2))
    mmproj = convert(checkpoint, tmp_path, "f16", vision_type).mmproj
    lost: dict[str, list[float]] = {}
    # of small pictures many: with one token the weights' error and the product's add up or cancel by chance
    sizes = {(28, 28): 64, (57, 83): 16, (224, 224): 1, (333, 1000): 1}
    rng = np.random.default_rng(0)
    with VisionEncoder(mmproj, device="cpu") as encoder:
        inputs = [
            [encoder.preprocessor.image(rng.integers(0, 256, (*size, 3), np.uint8)) for _ in range(n)]
            for size, n in sizes.items()
        ]
    expected = [
        vision_embeddings(
            checkpoint, np.concatenate([p.pixel_values for p in each]), [p.grid_thw for p in each]
        )
        for each in inputs
    ]
    for level in ("0", *levels()):
        monkeypatch.setenv("QVL_NATIVE", level)
        with VisionEncoder(mmproj, device="cpu") as encoder:
            found = [np.concatenate([e.embeddings for e in encoder.encode_patches(each)]) for each in inputs]
        lost[level] = [relative(*pair) for pair in zip(found, expected, strict=True)]
    for level in levels():
        assert all(a <= b for a, b in zip(lost[level], lost["0"], strict=True)), (level, lost)
