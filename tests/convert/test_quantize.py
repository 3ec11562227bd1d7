"""Types and bytes, held against libllama's own quantizer and gguf's own dequantizer."""

from __future__ import annotations

import hashlib
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGUFReader
from support.checkpoint import Shape, Style, encode, weights, write_checkpoint, write_weights
from support.llama_quantize import llama_quantize

from qvl.convert import Converted, convert
from qvl.convert.mixtures import TEXT_RECIPES

Digest = dict[str, tuple[str, str]]

# Eight layers tell a mixture's first, middle and last apart; sixteen are needed for q3_k_m's sixteenth.
# The names say what rows are: multiples of 256, of 32, or of neither.
EVEN = Shape(hidden=256, inner=256, heads=4, kv_heads=2, layers=8, depth=1, vocab_size=288)
GROUPED = Shape(hidden=256, inner=256, heads=8, kv_heads=1, layers=8, depth=1, vocab_size=288, tied=False)
DEEP = Shape(hidden=256, inner=256, heads=4, kv_heads=2, layers=16, depth=1, vocab_size=288)
UNEVEN = Shape(hidden=160, inner=288, heads=4, kv_heads=2, layers=8, depth=1, vocab_size=288)
ODD = Shape(hidden=80, inner=112, heads=2, kv_heads=1, layers=8, depth=1, vocab_size=288, tied=False)
# Those that need no importance matrix; the others, and these with one, are in test_importance.py.
TEXT_TYPES = (
    *("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q6_k", "iq4_nl", "iq4_xs"),
    *("q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q2_k", "q3_k_s", "q3_k_m", "q3_k_l"),
)
VISION_TYPES = ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k", "q4_k", "q4_0")
CASES = [
    *((shape, name) for shape in (EVEN, UNEVEN, ODD) for name in TEXT_TYPES),
    *((GROUPED, name) for name in ("q4_0", "q4_k_m", "q2_k", "iq4_nl", "iq4_xs")),
    (DEEP, "q3_k_m"),
]
NAMES = {EVEN: "even", GROUPED: "grouped", DEEP: "deep", UNEVEN: "uneven", ODD: "odd"}


def digests(path: Path) -> Digest:
    """Tensor name to type and hash of its bytes."""
    return {
        tensor.name: (tensor.tensor_type.name, hashlib.sha256(np.ascontiguousarray(tensor.data)).hexdigest())
        for tensor in GGUFReader(path).tensors
    }


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[Shape, tuple[Path, Converted]]:
    """A BF16 checkpoint and its float32 files for every shape."""
    style = Style(dtype="BF16", tokenizer="bytes", shards=2)
    made = {}
    for shape, name in NAMES.items():
        folder = write_checkpoint(tmp_path_factory.mktemp(name) / "c", shape, style)
        made[shape] = folder, convert(folder, folder.parent / "f32", "f32", "f32")
    return made


@pytest.mark.parametrize(("shape", "name"), CASES, ids=[f"{NAMES[shape]}-{name}" for shape, name in CASES])
def test_text_types_and_bytes_are_libllamas(
    sources: dict[Shape, tuple[Path, Converted]], tmp_path: Path, shape: Shape, name: str
) -> None:
    folder, whole = sources[shape]
    ours = convert(folder, tmp_path, name, "f32").text
    theirs = llama_quantize(whole.text, tmp_path / "llama.gguf", TEXT_RECIPES[name].file_type)
    assert digests(ours) == digests(theirs)
    fields = [GGUFReader(path).fields for path in (ours, theirs)]
    assert fields[0].keys() == fields[1].keys()
    for key in fields[0].keys() - {key for key in fields[0] if key.startswith("GGUF.")}:
        if key != "general.name":
            assert fields[0][key].contents() == fields[1][key].contents(), key


@pytest.mark.parametrize("name", VISION_TYPES)
def test_vision_values_are_close_to_the_source(tmp_path: Path, name: str) -> None:
    """By gguf-py's dequantizer: within a type's step, and exactly what ggml packs."""
    shape = Shape(dim=128, vision_heads=4, depth=2)
    folder = write_checkpoint(tmp_path / "c", shape)
    done = convert(folder, tmp_path, "q8_0", name)
    source = dict(weights(shape, Style()))
    found = {t.name: t for t in GGUFReader(done.mmproj).tensors}
    step = {"f32": 0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 0.01, "q6_k": 0.04, "q5_k": 0.08, "q5_1": 0.08,
            "q4_k": 0.15, "q4_0": 0.2}[name]  # fmt: skip
    for ours, theirs in (
        ("v.blk.1.ffn_down.weight", "blocks.1.mlp.fc2.weight"),
        ("mm.2.weight", "merger.mlp.2.weight"),
    ):
        got = gguf.dequantize(found[ours].data, found[ours].tensor_type).reshape(-1)
        want = source[f"visual.{theirs}"].reshape(-1)
        assert np.abs(got - want).max() <= step * np.abs(want).max()
    expected = {"f32": "F32", "f16": "F16"}.get(name, "F32")
    assert found["v.patch_embd.weight"].tensor_type.name == expected
    for tensor in found.values():
        if tensor.name.endswith(".bias") or ".ln" in tensor.name or "post_ln" in tensor.name:
            assert tensor.tensor_type.name == "F32"


@pytest.mark.parametrize(
    ("name", "wide", "narrow"),
    [("q6_k", "Q6_K", "Q8_0"), ("q5_k", "Q5_K", "Q5_1"), ("q4_k", "Q4_K", "Q5_0"), ("q8_0", "Q8_0", "Q8_0")],
)
def test_rows_that_do_not_divide_fall_back_and_say_so(
    tmp_path: Path, name: str, wide: str, narrow: str
) -> None:
    """An encoder 64 wide: 256-blocks fit only the mlp's and merger's rows of 256."""
    done = convert(write_checkpoint(tmp_path / "c"), tmp_path, "q4_k_m", name)
    types = {t.name: t.tensor_type.name for t in GGUFReader(done.mmproj).tensors}
    assert types["mm.0.weight"] == types["v.blk.0.ffn_down.weight"] == wide
    assert types["v.blk.0.attn_q.weight"] == narrow
    said = {f.name: (f.n_per_row, f.wanted, f.used) for f in done.files[1].fallbacks}
    fell = {name for name, kind in types.items() if kind == narrow != wide}
    assert set(said) == fell
    if fell:
        assert said["v.blk.0.attn_q.weight"] == (64, wide, narrow)


def test_nothing_depends_on_threads_or_the_source_type(tmp_path: Path) -> None:
    """BF16 values saved as BF16 and as F32, one worker and several."""
    shape = Shape(hidden=256, heads=4, depth=1)
    style = Style(dtype="BF16")
    half = write_checkpoint(tmp_path / "half", shape, style)
    full = write_checkpoint(tmp_path / "full", shape)
    wide = {n: (t.astype(np.uint32) << 16).view(np.float32) for n, t in weights(shape, style)}
    write_weights(full, wide, Style())
    one = convert(half, tmp_path / "a", "q4_k_m", "q6_k", threads=1)
    many = convert(full, tmp_path / "b", "q4_k_m", "q6_k", threads=5)
    assert digests(one.text) == digests(many.text)
    assert digests(one.mmproj) == digests(many.mmproj)


def with_weight(folder: Path, name: str, values: npt.NDArray[np.float32]) -> None:
    tensors = dict(weights(Shape(), Style()))
    tensors[name] = encode(values, "F32")
    write_weights(folder, tensors, Style())


def test_nan_weights_are_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c")
    values = dict(weights(Shape(), Style()))["model.layers.1.mlp.up_proj.weight"].copy()
    values[3, 5], values[200, 7], values[9, 9] = np.nan, np.inf, -np.inf
    with_weight(folder, "model.layers.1.mlp.up_proj.weight", values)
    whole = convert(folder, tmp_path / "a", "f32", "f32")
    assert whole.warnings == ("blk.1.ffn_up.weight: 3 weights are NaN or infinite (kept)",)
    small = convert(folder, tmp_path / "b", "q4_k_m", "q8_0")
    (warning,) = small.warnings
    assert warning.startswith("blk.1.ffn_up.weight: 3 weights are NaN or infinite (written as 0")
    tensor = next(t for t in GGUFReader(small.text).tensors if t.name == "blk.1.ffn_up.weight")
    got = gguf.dequantize(tensor.data, tensor.tensor_type)
    assert np.isfinite(got).all()
    assert np.abs(got[3, 5]) < 0.1


def test_weights_too_large_for_a_type_are_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c")
    values = np.zeros((128, 128), np.float32)
    values[0, :2] = 1e6, -7e4
    with_weight(folder, "model.layers.0.self_attn.o_proj.weight", values)
    (warning,) = convert(folder, tmp_path, "f16", "f16").warnings
    assert warning == "blk.0.attn_output.weight: 2 weights are too large for F16"
    for fits in ("bf16", "f32", "q8_0"):  # 1e6 / 127 is a scale that F16 holds
        assert convert(folder, tmp_path, fits, "f32", force=True).warnings == ()
    values[0, 0] = 1e9
    with_weight(folder, "model.layers.0.self_attn.o_proj.weight", values)
    (warning,) = convert(folder, tmp_path, "q8_0", "f32", force=True).warnings
    assert warning == "blk.0.attn_output.weight: 2 weights are too large for Q8_0"


def test_unaligned_data_is_read(tmp_path: Path) -> None:
    """A header of odd length puts every float at an odd address."""
    folder = write_checkpoint(tmp_path / "c")
    before = convert(folder, tmp_path / "a", "q4_k_m", "f16")
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    path.write_bytes((length + 1).to_bytes(8, "little") + raw[8 : 8 + length] + b" " + raw[8 + length :])
    after = convert(folder, tmp_path / "b", "q4_k_m", "f16")
    assert digests(after.text) == digests(before.text)
    assert digests(after.mmproj) == digests(before.mmproj)
