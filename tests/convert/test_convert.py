"""The whole conversion: other programs load its files, and it says what it did."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
from support.checkpoint import PREPROCESSOR, Shape, Style, weights, write_checkpoint, write_weights
from support.llama_log import silent_llama

from qvl.convert import Converted, convert
from qvl.runtime.errors import CheckpointError, InputError
from qvl.runtime.ggml.gguf import read_gguf

try:
    from llama_cpp import mtmd_cpp
except (ImportError, OSError, RuntimeError):  # compiled without it
    mtmd_cpp = None
needs_mtmd = pytest.mark.skipif(mtmd_cpp is None, reason="no libmtmd: QVL_LLAMA=full .ci/setup compiles it")

KEPT: list[Any] = []  # libmtmd holds a pointer to the callback, and cannot say which it had before


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """llama.cpp writes hundreds of lines to stderr."""
    with silent_llama() as silent:
        if mtmd_cpp is not None:
            mtmd_cpp.mtmd_log_set(silent, ctypes.c_void_p(0))
            mtmd_cpp.mtmd_helper_log_set(silent, ctypes.c_void_p(0))
        KEPT.append(silent)
        yield


@needs_mtmd
@pytest.mark.parametrize(
    ("text_type", "vision_type", "style"),
    [
        ("f32", "f32", Style()),
        ("q4_k_m", "q8_0", Style(dtype="BF16", config="nested", names="modules", tokenizer="fast", shards=2)),
        ("q8_0", "f16", Style(dtype="F16")),
        ("q5_1", "bf16", Style()),
        ("q6_k", "q4_k", Style(dtype="BF16")),
        ("bf16", "q6_k", Style(dtype="BF16")),
        ("q4_0", "q5_k", Style()),
        ("f16", "q4_0", Style()),
    ],
)
def test_libllama_and_libmtmd_load_the_pair(
    tmp_path: Path, text_type: str, vision_type: str, style: Style
) -> None:
    """And the encoder runs: mtmd's warm-up takes a picture through it."""
    done = convert(write_checkpoint(tmp_path / "c", style=style), tmp_path, text_type, vision_type)
    model = llama_cpp.llama_model_load_from_file(
        str(done.text).encode(), llama_cpp.llama_model_default_params()
    )
    assert model
    try:
        assert llama_cpp.llama_model_n_embd(model) == 128
        assert llama_cpp.llama_model_rope_type(model) == llama_cpp.LLAMA_ROPE_TYPE_MROPE
        vocab = llama_cpp.llama_model_get_vocab(model)
        assert llama_cpp.llama_vocab_n_tokens(vocab) == 4352
        assert not llama_cpp.llama_vocab_get_add_bos(vocab)
        params = mtmd_cpp.mtmd_context_params_default()
        params.use_gpu, params.warmup, params.n_threads = False, True, 2
        context = mtmd_cpp.mtmd_init_from_file(str(done.mmproj).encode(), model, params)
        assert context
        assert mtmd_cpp.mtmd_support_vision(context)
        assert mtmd_cpp.mtmd_decode_use_mrope(context)
        mtmd_cpp.mtmd_free(context)
    finally:
        llama_cpp.llama_model_free(model)


def test_metadata_of_the_pair(tmp_path: Path) -> None:
    """Upstream's keys, with the values of config.json and preprocessor_config.json."""
    style = Style(preprocessor={"min_pixels": 100352, "max_pixels": 401408, "image_mean": [0.5, 0.25, 0.125]})
    folder = write_checkpoint(tmp_path / "c", Shape(tied=False), style)
    (folder / "README.md").write_text('---\nlicense: "apache-2.0"\ntags: []\n---\n')
    done = convert(folder, tmp_path, "q4_k_m", "q4_k", name="Some-VL")
    text, vision = read_gguf(done.text).metadata, read_gguf(done.mmproj).metadata
    expected_text = {
        "general.architecture": "qwen2vl", "general.type": "model", "general.name": "Some-VL",
        "general.license": "apache-2.0", "general.file_type": 15, "general.quantization_version": 2,
        "qwen2vl.block_count": 2, "qwen2vl.context_length": 32768, "qwen2vl.embedding_length": 128,
        "qwen2vl.feed_forward_length": 256, "qwen2vl.attention.head_count": 4,
        "qwen2vl.attention.head_count_kv": 2, "qwen2vl.rope.dimension_sections": [4, 6, 6, 0],
        "qwen2vl.rope.freq_base": 1e6, "qwen2vl.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
    }  # fmt: skip
    assert {key: text[key] for key in expected_text} == expected_text
    expected_vision = {
        "general.architecture": "clip", "general.type": "mmproj", "general.file_type": 14,
        "clip.has_vision_encoder": True, "clip.projector_type": "qwen2vl_merger",
        "clip.vision.embedding_length": 64, "clip.vision.feed_forward_length": 256,
        "clip.vision.block_count": 2, "clip.vision.attention.head_count": 2,
        "clip.vision.attention.layer_norm_epsilon": pytest.approx(1e-6), "clip.vision.patch_size": 14,
        "clip.vision.projection_dim": 128, "clip.vision.spatial_merge_size": 2,
        "clip.vision.image_mean": [0.5, 0.25, 0.125],
        "clip.vision.image_std": pytest.approx(PREPROCESSOR["image_std"]),
        "clip.vision.image_min_pixels": 100352, "clip.vision.image_max_pixels": 401408,
        "qvl.vision.temporal_patch_size": 2,
    }  # fmt: skip
    assert {key: vision[key] for key in expected_vision} == expected_vision


def test_keys_are_those_that_gguf_knows(tiny_model: Converted) -> None:
    """Every key but our own is spelled as in gguf-py's constants."""
    known = set()

    def collect(keys: type) -> None:
        for name, value in vars(keys).items():
            if isinstance(value, type):
                collect(value)
            elif isinstance(value, str) and not name.startswith("_"):
                known.add(value.replace("{arch}", "qwen2vl"))

    collect(gguf.Keys)
    for path in (tiny_model.text, tiny_model.mmproj):
        assert {key for key in read_gguf(path).metadata if key not in known} <= {
            "qvl.vision.temporal_patch_size",
            "qvl.family",
            "qvl.tokenizer.eos_token_ids",
        }


@pytest.mark.parametrize(
    ("values", "limits"),
    [
        ({"size": {"shortest_edge": 6272, "longest_edge": 12544}}, (6272, 12544)),
        ({}, (3136, 12845056)),
    ],
)
def test_limits_as_transformers_5_writes_them(
    tmp_path: Path, values: dict[str, object], limits: tuple[int, int]
) -> None:
    folder = write_checkpoint(tmp_path / "c")
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": values}))
    metadata = read_gguf(convert(folder, tmp_path, "f32", "f32").mmproj).metadata
    assert (metadata["clip.vision.image_min_pixels"], metadata["clip.vision.image_max_pixels"]) == limits


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_pixels": 5, "max_pixels": 4}, "min_pixels 5 and max_pixels 4"),
        ({"max_pixels": "many"}, "max_pixels 'many'"),
        ({"image_mean": [0.5]}, r"image_mean is \[0.5\]"),
        ({"image_std": [0.5, 0.5, 0]}, "image_std is"),
        ({"patch_size": 16}, "patch_size is 16, expected 14"),
        ({"merge_size": 1}, "merge_size is 1, expected 2"),
    ],
)
def test_a_preprocessor_that_does_not_fit(tmp_path: Path, values: dict[str, object], message: str) -> None:
    folder = write_checkpoint(tmp_path / "c", style=Style(preprocessor=values))
    with pytest.raises(CheckpointError, match=message):
        convert(folder, tmp_path / "out", "f32", "f32")


def test_progress_counts_source_bytes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    convert(tiny_checkpoint, tmp_path, "q4_k_m", "f16", progress=lambda *call: calls.append(call))
    total = sum(tensor.nbytes for _, tensor in weights(Shape(), Style()))
    assert {call[1] for call in calls} == {total}
    done = [call[0] for call in calls]
    assert done == sorted(done)
    assert done[-1] == total
    assert {call[2] for call in calls} >= {"token_embd.weight", "mm.2.bias"}


def test_the_summary_is_what_lies_on_disk(tiny_checkpoint: Path, tmp_path: Path) -> None:
    done = convert(tiny_checkpoint, tmp_path, "q4_k_m", "q6_k")
    assert [summary.path for summary in done.files] == [done.text, done.mmproj]
    assert done.seconds > 0
    for summary in done.files:
        held = read_gguf(summary.path)
        assert summary.n_bytes == summary.path.stat().st_size
        assert summary.n_tensors == len(held.tensors)
        for total in summary.by_type:
            same = [t for t in held.tensors.values() if t.type.name == total.type]
            assert total.n_tensors == len(same)
            assert total.n_bytes == sum(t.nbytes for t in same)
            assert total.n_elements == sum(t.n_elements for t in same)
        sizes = [total.n_bytes for total in summary.by_type]
        assert sizes == sorted(sizes, reverse=True)
        assert summary.bits_per_weight == pytest.approx(8 * sum(sizes) / summary.n_elements)


def test_overrides(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", Shape(tied=False))
    done = convert(
        folder,
        tmp_path,
        "q8_0",
        "q8_0",
        tensor_types=[r"blk\.0\.ffn_up=q4_0", r"^mm\.=f16", "ffn_up=q5_1"],
        token_embedding_type="q4_1",
        output_type="bf16",
    )
    types = {
        t.name: t.type.name for path in (done.text, done.mmproj) for t in read_gguf(path).tensors.values()
    }
    expected = {
        "blk.0.ffn_up.weight": "Q4_0", "blk.1.ffn_up.weight": "Q5_1", "blk.0.ffn_down.weight": "Q8_0",
        "token_embd.weight": "Q4_1", "output.weight": "BF16", "mm.0.weight": "F16",
        "v.blk.1.ffn_up.weight": "Q5_1", "mm.0.bias": "F32", "blk.0.attn_norm.weight": "F32",
    }  # fmt: skip
    assert {name: types[name] for name in expected} == expected


def test_an_override_without_a_tensor_is_a_mistake(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", Shape())
    with pytest.raises(InputError, match=r"ffn_upp=q5_k.*no tensor") as refused:
        convert(folder, tmp_path, tensor_types=["ffn_up=q4_0", "ffn_upp=q5_k"])
    assert "blk.0.ffn_up.weight" in (refused.value.hint or "")
    assert not list(tmp_path.glob("*.gguf"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's high-water mark")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A checkpoint of 200 MB: what its conversion adds to the process stays far below its size."""
    style = Style(dtype="BF16", tokenizer="bytes")
    tiny = Shape(hidden=512, inner=512, heads=4, depth=1, vocab_size=288)
    large = Shape(hidden=512, inner=16384, heads=4, layers=4, depth=1, vocab_size=288)
    small = _peak(write_checkpoint(tmp_path / "a", tiny, style), tmp_path)
    folder = write_checkpoint(tmp_path / "b", large, style)
    size = (folder / "model.safetensors").stat().st_size
    assert size > 190e6
    assert _peak(folder, tmp_path) - small < 0.3 * size


def _peak(folder: Path, out: Path) -> int:
    """Peak resident bytes of a process that converts to f16."""
    # Not getrusage: its maximum is inherited from the process that started this one.
    code = f"""
        import re
        from pathlib import Path
        from qvl.convert import convert
        convert({str(folder)!r}, {str(out)!r}, "f16", "f16", force=True)
        print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return 1024 * int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_an_untrained_head_of_zeros(tmp_path: Path) -> None:
    """All-zero and constant rows are where scales divide by nothing."""
    folder = write_checkpoint(tmp_path / "c")
    tensors = dict(weights(Shape(), Style()))
    tensors["model.layers.0.mlp.down_proj.weight"][:] = 0
    tensors["model.layers.1.mlp.down_proj.weight"][:] = 0.5
    write_weights(folder, tensors, Style())
    done = convert(folder, tmp_path, "q4_k_m", "f32")
    assert done.warnings == ()
    held = {t.name: t for t in gguf.GGUFReader(done.text).tensors}
    for i, value in ((0, 0.0), (1, 0.5)):
        tensor = held[f"blk.{i}.ffn_down.weight"]
        np.testing.assert_allclose(gguf.dequantize(tensor.data, tensor.tensor_type), value, atol=0.01)
