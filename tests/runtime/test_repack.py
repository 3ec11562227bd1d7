"""Matrices in the order that llama.cpp's older kernels like, or as the file has them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize
from support.checkpoint import Shape, write_checkpoint

from qvl.convert import Converted, convert
from qvl.runtime.ggml.features import cpu_features
from qvl.runtime.ggml.gguf import read_gguf
from qvl.runtime.llama import model as llama_model
from qvl.runtime.llama import repack
from qvl.runtime.llama.context import Context
from qvl.runtime.llama.model import LlamaModel

TOKENS = [int(token) for token in np.random.default_rng(0).integers(0, 900, 60)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = Shape(hidden=256, inner=512, heads=2, kv_heads=1, layers=2)  # whole blocks of 256
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "wide", shape)


@pytest.fixture(scope="module")
def k_quants(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    return convert(checkpoint, tmp_path_factory.mktemp("k"), "q4_k_m", "q8_0")


@pytest.mark.parametrize(
    ("features", "wanted"), [((), True), (("AVX512_VNNI",), False), (("AVX512_VNNI", "AMX_INT8"), False)]
)
def test_k_quants_stay_as_they_are_where_that_is_faster(
    k_quants: Converted, monkeypatch: pytest.MonkeyPatch, features: tuple[str, ...], wanted: bool
) -> None:
    monkeypatch.setattr(repack, "cpu_features", lambda: features)
    gguf = read_gguf(k_quants.text)
    assert repack.wants_repacking(gguf, "prefill") is wanted
    assert wanted or repack.repacked_bytes(gguf, "prefill") == 0
    assert repack.wants_repacking(gguf, "decode") is ("AMX_INT8" not in features)
    own = frozenset(tensor.type for tensor in gguf.tensors.values())
    assert not repack.wants_repacking(gguf, "prefill", own)
    assert repack.wants_repacking(gguf, "decode", own) is ("AMX_INT8" not in features)


@pytest.mark.skipif("AVX2" not in cpu_features(), reason="another CPU repacks other types")
def test_types_without_a_tiled_product_are_repacked(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repack, "cpu_features", lambda: ("AVX512_VNNI",))
    gguf = read_gguf(convert(checkpoint, tmp_path, "q4_0", "q8_0").text)
    assert repack.wants_repacking(gguf, "prefill")
    assert repack.repacked_bytes(gguf) > 0


@pytest.mark.skipif("AMX_INT8" in cpu_features(), reason="ggml's AMX kernels end the process on some builds")
def test_the_logits_are_as_close_to_the_weights_either_way(
    checkpoint: Path, k_quants: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both multiply activations of eight bits, rounded in their own ways; float32 is the judge."""
    exact = convert(checkpoint, tmp_path, "f32", "q8_0")
    quantized = {tensor.name: tensor for tensor in GGUFReader(k_quants.text).tensors}
    for tensor in GGUFReader(exact.text, "r+").tensors:
        stored = quantized[tensor.name]
        tensor.data[:] = dequantize(stored.data, stored.tensor_type).reshape(tensor.data.shape)
    found = {}
    for name, text, wanted in (
        ("exact", exact, False),
        ("repacked", k_quants, True),
        ("as stored", k_quants, False),
    ):
        monkeypatch.setattr(llama_model, "wants_repacking", lambda *_, wanted=wanted: wanted)
        with LlamaModel(text.text, device="cpu") as model, Context(model, n_outputs_max=60) as context:
            context.decode_tokens(TOKENS, 0, outputs="all")
            found[name] = context.logits()
    errors = {n: np.sqrt(np.mean((logits - found["exact"]) ** 2)) for n, logits in found.items()}
    assert errors["as stored"] < 0.05 * found["exact"].std()
    assert errors["as stored"] == pytest.approx(errors["repacked"], rel=0.25)
