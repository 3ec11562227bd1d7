"""Our own K-quants, held against libggml's bytes; without a compiler or AVX2 there is nothing to hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoint import Shape, Style, write_checkpoint

from qvl.convert import convert
from qvl.convert.native import by_libggml, compiled, kquants
from qvl.convert.quantize import _Worker
from qvl.runtime.ggml import library as ggml
from qvl.runtime.ggml.library import Type

K_QUANTS = (Type.Q4_K, Type.Q5_K, Type.Q6_K)
KINDS = ("plain", "uneven", "whole numbers", "sparse", "steps", "huge")

needs_kernel = pytest.mark.skipif(compiled() is None, reason="not compiled, or a CPU without AVX2")


def rows(kind: str, n_rows: int, n_blocks: int, seed: int) -> np.ndarray:
    """float32 [n_rows, 256 n_blocks]: each row of another size, from next to nothing to large."""
    rng = np.random.default_rng(seed)
    shape = (n_rows, 256 * n_blocks)
    x = rng.standard_normal(shape) * 10.0 ** rng.uniform(-30, 4, (n_rows, 1))
    if kind == "uneven":
        x *= np.repeat(10.0 ** rng.integers(-20, 1, (n_rows, shape[1] // 16)), 16, axis=1)
    elif kind == "whole numbers":  # ties
        x = np.round(x / np.abs(x).max(axis=1, keepdims=True) * rng.integers(1, 40, (n_rows, 1)))
    elif kind == "sparse":
        x[rng.random(shape) < 0.7] = 0
    elif kind == "steps":  # blocks of one value
        x = np.repeat(x[:, ::32], 32, axis=1)
    elif kind == "huge":
        x *= 1e30
    return np.clip(x, -3e38, 3e38).astype(np.float32)


@needs_kernel
@pytest.mark.parametrize("level", [1, 2], ids=["avx2", "avx512"])
@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    to=st.sampled_from(K_QUANTS),
    n_rows=st.integers(1, 7),
    n_blocks=st.integers(1, 5),
    weighed=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_the_bytes_are_libggmls(
    level: int, kind: str, to: Type, n_rows: int, n_blocks: int, weighed: bool, seed: int
) -> None:
    quantizer = compiled(level)
    if quantizer is None:
        pytest.skip("this CPU has no such instructions")
    x, importance = rows(kind, n_rows, n_blocks, seed), None
    if weighed:
        rng = np.random.default_rng(seed)
        importance = (10.0 ** rng.uniform(-8, 8, x.shape[1])).astype(np.float32)
        importance[rng.random(x.shape[1]) < 0.1] = 0
    out = np.zeros(n_rows * ggml.row_size(to, x.shape[1]), np.uint8)
    quantizer.quantize(to, x, out, importance)
    assert np.array_equal(out, by_libggml(to, x, importance))


@needs_kernel
def test_it_is_used_and_agrees() -> None:
    found = kquants()
    assert found is not None
    assert found.types == frozenset(K_QUANTS)
    assert _Worker().fast is found


@needs_kernel
def test_what_does_not_fit_is_refused() -> None:
    found = kquants()
    assert found is not None
    x, out = np.zeros((2, 256), np.float32), np.zeros(2 * 144, np.uint8)
    found.quantize(Type.Q4_K, x, out)
    with pytest.raises(ValueError, match="Q8_0"):
        found.quantize(Type.Q8_0, x, out)
    with pytest.raises(ValueError, match="importance"):
        found.quantize(Type.Q4_K, x, out, np.zeros(512, np.float32))
    with pytest.raises(ValueError, match="288 bytes"):
        found.quantize(Type.Q4_K, x[:1], out)


def test_the_files_are_the_same_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(hidden=256, heads=4, dim=256, vision_heads=4, depth=1)
    folder = write_checkpoint(tmp_path / "c", shape, Style(dtype="BF16", tokenizer="bytes"))
    one = convert(folder, tmp_path / "a", "q4_k_m", "q5_k")
    monkeypatch.setenv("QVL_NATIVE", "0")
    kquants.cache_clear()
    try:
        assert kquants() is None
        other = convert(folder, tmp_path / "b", "q4_k_m", "q5_k")
    finally:
        kquants.cache_clear()
    for a, b in ((one.text, other.text), (one.mmproj, other.mmproj)):
        assert a.read_bytes() == b.read_bytes()
