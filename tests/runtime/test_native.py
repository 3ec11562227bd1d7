"""Our kernels against the same arithmetic in numpy, float64, and against their bound of bfloat16."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qvl.runtime.ggml import library as ggml
from qvl.runtime.ggml.devices import cpu_device
from qvl.runtime.ggml.graph import Graph, KernelParams, get_data
from qvl.runtime.ggml.scheduler import Runner
from qvl.runtime.native import kernels
from qvl.runtime.vision.layers import _attention_params

FOUND = kernels()
pytestmark = pytest.mark.skipif(
    FOUND is None, reason="this CPU has no AVX512_BF16, or the kernels are not compiled"
)
BF16_STEP = 2.0**-7  # the spacing of bfloat16 relative to the value, at most


def bf16(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rounded to bfloat16, to nearest even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def stored(x: NDArray[np.float32], kind: ggml.Type) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """A matrix in a type's bytes, by ggml, and what those bytes say, by numpy."""
    rows, columns = x.shape
    raw = np.empty(ggml.row_size(kind, columns) * rows, np.uint8)
    if kind is ggml.Type.F32:
        return x.copy().view(np.uint8).reshape(-1), x
    source = np.ascontiguousarray(x)
    ggml.lib().ggml_quantize_chunk(int(kind), source.ctypes.data, raw.ctypes.data, 0, rows, columns, None)
    if kind is ggml.Type.BF16:
        return raw, bf16(x)
    if kind is ggml.Type.F16:
        return raw, x.astype(np.float16).astype(np.float32)
    return raw, dequantize(raw.reshape(rows, -1), GGMLQuantizationType(int(kind)))


Input = tuple[ggml.Type, tuple[int, ...], NDArray[Any]]


def run(
    kernel: int,
    kind: ggml.Type,
    shape: tuple[int, ...],
    inputs: list[Input],
    params: KernelParams,
    threads: int = 2,
) -> NDArray[np.float32]:
    graph, runner = Graph(64), Runner(cpu_device(), threads, 256)
    tensors = [graph.input(t, *ne) for t, ne, _ in inputs]
    out = graph.output(graph.custom(kernel, kind, shape, tensors, params).cast(ggml.Type.F32))
    runner.prepare(graph)
    results = []
    for _ in range(2):  # a graph is kept, and with it what its threads have counted
        for tensor, (_, _, data) in zip(tensors, inputs, strict=True):
            raw = np.ascontiguousarray(data)
            ggml.lib().ggml_backend_tensor_set(tensor.pointer, raw.ctypes.data, 0, raw.nbytes)
        runner.run(graph)
        results.append(get_data(out).copy())
    assert np.array_equal(*results)
    runner.close()
    graph.close()
    return results[0]


@settings(max_examples=60, deadline=None)
@given(
    n_in=st.integers(1, 20).map(lambda n: 32 * n),
    n_out=st.integers(1, 200),
    n=st.integers(1, 40),
    kind=st.sampled_from(sorted(FOUND.types) if FOUND else [ggml.Type.F32]),
    silu=st.booleans(),
    residual=st.booleans(),
    narrow=st.booleans(),
)
def test_linear(
    n_in: int, n_out: int, n: int, kind: ggml.Type, silu: bool, residual: bool, narrow: bool
) -> None:
    assert FOUND is not None
    n_in += -n_in % ggml.block_size(kind)
    rng = np.random.default_rng(n_in * n_out + n)
    raw, w = stored(rng.standard_normal((n_out, n_in), dtype=np.float32), kind)
    x = bf16(rng.standard_normal((n, n_in), dtype=np.float32))
    bias = rng.standard_normal(n_out, dtype=np.float32)
    extra = rng.standard_normal((n, n_out), dtype=np.float32)
    inputs = [
        (kind, (n_in, n_out), raw),
        (ggml.Type.BF16, (n_in, n), (x.view(np.uint32) >> 16).astype(np.uint16)),
        (ggml.Type.F32, (n_out,), bias),
        *([(ggml.Type.F32, (n_out, n), extra)] if residual else []),
    ]
    out_type = ggml.Type.BF16 if narrow else ggml.Type.F32
    found = run(FOUND.linear, out_type, (n_out, n), inputs, KernelParams(choice=int(silu)))
    y = x.astype(np.float64) @ bf16(w).astype(np.float64).T + bias
    if silu:
        y = y / (1 + np.exp(-y))
    y = y + extra if residual else y
    scale = np.abs(x) @ np.abs(w).T + np.abs(bias) + 1
    # a dequantized weight that float32 arithmetic in another order moves across a tie rounds the other way
    slack = np.float32(1e-6) * np.abs(w).max()
    either = np.abs(x) @ np.abs(bf16(w + slack) - bf16(w - slack)).T
    bound = 2e-6 * scale + either + (BF16_STEP / 2 * np.abs(y) if narrow else 0)
    assert np.all(np.abs(found - y) <= bound)


def test_every_common_type_of_weight_is_taken() -> None:
    assert FOUND is not None
    names = {"F32", "F16", "BF16", "Q8_0", "Q4_K", "Q5_K", "Q6_K"}
    assert {kind.name for kind in FOUND.types} == names


@settings(max_examples=60, deadline=None)
@given(
    runs=st.lists(
        st.tuples(st.integers(1, 3), st.integers(1, 90).map(lambda n: 4 * n)), min_size=1, max_size=3
    ),
    head_dim=st.integers(1, 20).map(lambda n: 4 * n),
    n_head=st.integers(1, 3),
    spread=st.sampled_from([0.1, 1.0, 8.0]),
    threads=st.integers(1, 3),
)
def test_attention(
    runs: list[tuple[int, int]], head_dim: int, n_head: int, spread: float, threads: int
) -> None:
    assert FOUND is not None
    n = sum(count * size for count, size in runs)
    rng = np.random.default_rng(n + head_dim)
    q, k, v = (bf16(rng.standard_normal((n, n_head, head_dim), dtype=np.float32)) for _ in range(3))
    q = bf16(q * np.float32(spread))
    scale = 1 / np.sqrt(head_dim)
    inputs = [(ggml.Type.F32, (head_dim, n_head, n), x) for x in (q, k, v)]
    shape = (head_dim * n_head, n)
    found = run(FOUND.attention, ggml.Type.F32, shape, inputs, _attention_params(runs, float(scale)), threads)
    start = 0
    for count, size in runs:
        for _ in range(count):
            part = slice(start, start + size)
            scores = np.einsum("ihd,jhd->hij", q[part], k[part], dtype=np.float64) * scale
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            expected = np.einsum("hij,jhd->ihd", weights, v[part], dtype=np.float64)
            bound = np.einsum("hij,jhd->ihd", weights, np.abs(v[part]), dtype=np.float64)
            error = np.abs(found[part].reshape(size, n_head, head_dim) - expected)
            # the weights are rounded to bfloat16 before they multiply v
            assert np.all(error <= (BF16_STEP / 2 + 1e-4) * bound + 1e-6)
            start += size


@settings(max_examples=30, deadline=None)
@given(n_in=st.integers(2, 300), n=st.integers(1, 9), shift=st.sampled_from([0.0, 100.0]))
def test_layer_norm(n_in: int, n: int, shift: float) -> None:
    assert FOUND is not None
    rng = np.random.default_rng(n_in * 10 + n)
    x = (rng.standard_normal((n, n_in)) + shift).astype(np.float32)
    weight, bias = rng.standard_normal((2, n_in), dtype=np.float32)
    inputs = [
        (ggml.Type.F32, (n_in, n), x), (ggml.Type.F32, (n_in,), weight), (ggml.Type.F32, (n_in,), bias)
    ]  # fmt: skip
    found = run(FOUND.layer_norm, ggml.Type.BF16, (n_in, n), inputs, KernelParams(scalar=1e-6))
    wide = x.astype(np.float64)
    normal = (wide - wide.mean(1, keepdims=True)) / np.sqrt(wide.var(1, keepdims=True) + 1e-6)
    expected = normal * weight + bias
    assert np.all(np.abs(found - expected) <= BF16_STEP / 2 * np.abs(expected) + 1e-4 * (1 + shift))


def test_params_match_the_c_struct() -> None:
    params = _attention_params([(2, 12), (1, 4)], 0.5)
    raw = np.frombuffer(ctypes.string_at(ctypes.addressof(params), ctypes.sizeof(params)), np.int64)
    assert raw[2:].tolist() == [2, 12, 1, 4]
