"""The decoder's products by our own kernels: which they take, and how far from float32 the logits are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize
from numpy.typing import NDArray
from support.checkpoint import Shape, write_checkpoint

from qvl.convert import convert
from qvl.runtime.llama.context import Context
from qvl.runtime.llama.model import LlamaModel
from qvl.runtime.llama.products import FEWEST_COLUMNS
from qvl.runtime.native import levels

LEVELS = list(levels())
TOKENS = [int(token) for token in np.random.default_rng(0).integers(0, 900, FEWEST_COLUMNS + 5)]
pytestmark = pytest.mark.skipif(not LEVELS, reason="no kernels were compiled for this processor")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = Shape(hidden=256, inner=512, heads=2, kv_heads=1, layers=2)  # whole blocks of 256
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "wide", shape)


@pytest.fixture(scope="module", params=["q4_k_m", "q5_k_m", "q6_k", "q8_0", "f16", "bf16"])
def pair(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[LlamaModel, NDArray[np.float32]]]:
    """A model of a type, and the logits of its weights in float32."""
    folder = tmp_path_factory.mktemp(request.param)
    stored = convert(checkpoint, folder, request.param, "q8_0")
    exact = convert(checkpoint, folder / "exact", "f32", "q8_0")
    tensors = {tensor.name: tensor for tensor in GGUFReader(stored.text).tensors}
    for tensor in GGUFReader(exact.text, "r+").tensors:
        source = tensors[tensor.name]
        tensor.data[:] = dequantize(source.data, source.tensor_type).reshape(tensor.data.shape)
    with LlamaModel(exact.text, device="cpu", precision="auto") as model:
        expected = logits(model)
    with LlamaModel(stored.text, device="cpu", optimize="prefill", precision="auto") as model:
        yield model, expected


def logits(model: LlamaModel, threads: int = 2) -> NDArray[np.float32]:
    with Context(model, n_ctx=512, n_outputs_max=len(TOKENS), threads=threads, kv_type="f32") as context:
        context.decode_tokens(TOKENS, 0, outputs="all")
        return context.logits()


def error(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("level", LEVELS)
def test_logits_are_as_close_to_float32_as_ggml_s(
    pair: tuple[LlamaModel, NDArray[np.float32]], level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, expected = pair
    monkeypatch.setenv("QVL_NATIVE", "0")
    plain = logits(model)
    monkeypatch.setenv("QVL_NATIVE", level)
    found = logits(model)
    print(f"{level}: {error(found, expected):.2e}, ggml {error(plain, expected):.2e}")
    assert error(found, expected) <= 1.02 * error(plain, expected)
    np.testing.assert_array_equal(logits(model, threads=3), found)


def test_short_prompts_and_exact_models_stay_with_ggml(
    pair: tuple[LlamaModel, NDArray[np.float32]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = pair

    def first(n: int, model: LlamaModel) -> NDArray[np.float32]:
        with Context(model, n_ctx=512, n_outputs_max=n, threads=2) as context:
            context.decode_tokens(TOKENS[:n], 0, outputs="all")
            return context.logits()

    with LlamaModel(model.path, device="cpu", optimize="prefill", precision="exact") as exact:
        found = first(len(TOKENS), exact)
    short = first(FEWEST_COLUMNS - 1, model)
    monkeypatch.setenv("QVL_NATIVE", "0")
    np.testing.assert_array_equal(found, first(len(TOKENS), model))
    np.testing.assert_array_equal(short, first(FEWEST_COLUMNS - 1, model))
