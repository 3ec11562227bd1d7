"""Our kernels, at every level that this processor has, against the same arithmetic in float64."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qvl.runtime.errors import InputError
from qvl.runtime.ggml import library as ggml
from qvl.runtime.ggml.devices import cpu_device
from qvl.runtime.ggml.graph import Graph, KernelParams, Tensor, get_data
from qvl.runtime.ggml.scheduler import GraphRunner
from qvl.runtime.native import Activation, Format, Kernels, kernels, levels
from qvl.runtime.vision.layers import _attention_params

SOURCES = Path(__file__).parents[2] / "runtime" / "native"
LEVELS = levels()
TYPES = [
    ggml.Type[name] for name in ("F32", "F16", "BF16", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
]  # those that the kernels take
on_every_level = pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
# rounding of a value, in parts of the largest of its block: half a step of the format; a byte that is nearly
# the largest value of its block with the other sign may be cut by a whole step
STEP = {"bytes": 1 / 128, "integers": 1 / 5792 / 2, "bf16": 2.0**-8, "float": 2.0**-24}

Input = tuple[ggml.Type, tuple[int, ...], NDArray[Any]]
Matrix = NDArray[np.float32]


def arithmetic(level: Kernels, kind: Format) -> str:
    """A key of STEP: what a level multiplies."""
    if kind is Format.BYTES:
        return "bytes"
    return {"avx512bf16": "bf16", "neon": "float", "neoni8mm": "float"}.get(level.name, "integers")


def step(level: Kernels, kind: Format, x: Matrix) -> NDArray[np.float64]:
    """A bound on the rounding of each value of x, rows first, in a format."""
    name = arithmetic(level, kind)
    if name in ("bf16", "float"):
        return STEP[name] * np.abs(x.astype(np.float64))
    size = 32 if name == "bytes" else 64
    padded = np.pad(np.abs(x), ((0, 0), (0, -x.shape[1] % size))).reshape(x.shape[0], -1, size)
    return np.repeat(padded.max(-1), size, axis=1)[:, : x.shape[1]] * (STEP[name] * 1.0001)


def stored(x: Matrix, kind: ggml.Type) -> tuple[NDArray[np.uint8], Matrix]:
    """A matrix in a type's bytes, by ggml, and what those bytes say, by numpy."""
    rows, columns = x.shape
    raw = np.empty(ggml.row_size(kind, columns) * rows, np.uint8)
    if kind is ggml.Type.F32:
        return x.copy().view(np.uint8).reshape(-1), x
    source = np.ascontiguousarray(x)
    ggml.lib().ggml_quantize_chunk(int(kind), source.ctypes.data, raw.ctypes.data, 0, rows, columns, None)
    if kind is ggml.Type.BF16:
        return raw, (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(x.shape)
    if kind is ggml.Type.F16:
        return raw, x.astype(np.float16).astype(np.float32)
    return raw, dequantize(raw.reshape(rows, -1), GGMLQuantizationType(int(kind)))


def run(build: Any, inputs: list[Input], threads: int = 2) -> Matrix:
    """Compute build(graph, tensors) twice: a graph is kept, with the tasks that its threads counted."""
    graph, runner = Graph(64), GraphRunner(cpu_device(), threads)
    tensors = [graph.input(kind, *ne) for kind, ne, _ in inputs]
    out = graph.output(build(graph, tensors))
    runner.prepare(graph)
    results = []
    for _ in range(2):
        for tensor, (_, _, data) in zip(tensors, inputs, strict=True):
            if not ggml.tensor(tensor.pointer).data:
                continue  # build did not use it
            raw = np.ascontiguousarray(data)
            ggml.lib().ggml_backend_tensor_set(tensor.pointer, raw.ctypes.data, 0, raw.nbytes)
        runner.run(graph)
        results.append(get_data(out).copy())
    assert np.array_equal(*results)
    runner.close()
    graph.close()
    return results[0]


def made(g: Graph, level: Kernels, kernel: int, kind: Format, n_in: int, n: int, *args: Any) -> Tensor:
    """A node of a kernel that makes n columns in a format."""
    if kind is Format.F32:
        return g.custom(kernel, ggml.Type.F32, (n_in, n), *args)
    return g.custom(kernel, ggml.Type.I8, (level.row_bytes(kind, n_in), n), *args)


def activated(y: NDArray[np.float64], act: Activation) -> NDArray[np.float64]:
    erf = np.vectorize(__import__("math").erf)
    return {
        Activation.NONE: lambda: y,
        Activation.SILU: lambda: y / (1 + np.exp(-y)),
        Activation.GELU_ERF: lambda: y * (1 + erf(y / np.sqrt(2))) / 2,
        Activation.GELU_TANH: lambda: y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3))) / 2,
        Activation.GELU_QUICK: lambda: y / (1 + np.exp(-1.702 * y)),
    }[act]()


def test_which_levels_run(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\nkernels tested here: {', '.join(LEVELS) or 'none'}")
    features = ggml_features()
    expected = {
        "AVX2": "avx2",
        "AVX_VNNI": "avxvnni",
        "AVX512_VNNI": "avx512vnni",
        "AVX512_BF16": "avx512bf16",
    }
    missing = {level for feature, level in expected.items() if feature in features} - set(LEVELS)
    assert not missing, "this processor has the instructions, but the kernels were not compiled"


def ggml_features() -> set[str]:
    if not (path := Path("/proc/cpuinfo")).exists():
        return set()
    found = re.search(r"^flags\s*:(.*)$", path.read_text(), re.MULTILINE)
    return {flag.upper() for flag in found[1].split()} if found else set()


def test_environment_takes_a_level(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, level in LEVELS.items():
        monkeypatch.setenv("QVL_NATIVE", name)
        assert kernels() is level
    monkeypatch.setenv("QVL_NATIVE", "0")
    assert kernels() is None
    monkeypatch.delenv("QVL_NATIVE")
    assert kernels() is next(iter(LEVELS.values()), None)
    monkeypatch.setenv("QVL_NATIVE", "mmx")
    with pytest.raises(InputError, match="QVL_NATIVE=mmx: no such kernels"):
        kernels()


@on_every_level
def test_every_common_type_of_weight_is_taken(level: Kernels) -> None:
    assert set(level.formats) == set(TYPES)


@on_every_level
@settings(max_examples=60, deadline=None)
@given(
    n_in=st.integers(1, 700),
    n_out=st.integers(1, 200),
    n=st.integers(1, 40),
    kind=st.sampled_from(TYPES),
    act=st.sampled_from(Activation),
    bias=st.booleans(),
    other=st.sampled_from(["", "add", "multiply"]),
    threads=st.integers(1, 3),
)
def test_linear(
    level: Kernels,
    n_in: int,
    n_out: int,
    n: int,
    kind: ggml.Type,
    act: Activation,
    bias: bool,
    other: str,
    threads: int,
) -> None:
    n_in += -n_in % ggml.block_size(kind)
    rng = np.random.default_rng(n_in * n_out + n)
    raw, w = stored(rng.standard_normal((n_out, n_in), dtype=np.float32), kind)
    x = rng.standard_normal((n, n_in), dtype=np.float32)
    b = rng.standard_normal(n_out, dtype=np.float32)
    o = rng.standard_normal((n, n_out), dtype=np.float32)
    inputs: list[Input] = [
        (kind, (n_in, n_out), raw), (ggml.Type.F32, (n_in, n), x),
        (ggml.Type.F32, (n_out,), b), (ggml.Type.F32, (n_out, n), o),
    ]  # fmt: skip
    target = level.formats[kind]

    def build(g: Graph, tensors: list[Tensor]) -> Tensor:
        matrix, columns, shift, extra = tensors
        params = KernelParams(choice=int(target) << 16)
        columns = made(g, level, level.prepare, target, n_in, n, (columns,), params)
        params = KernelParams(choice=int(act) | (other == "multiply") << 8)
        sources = (matrix, columns, shift if bias else None, extra if other else None)
        return made(g, level, level.linear, Format.F32, n_out, n, sources, params)

    found = run(build, inputs, threads)
    wide = w.astype(np.float64)
    y = x.astype(np.float64) @ wide.T + (b if bias else 0)
    size = np.abs(x) @ np.abs(w).T + 1
    error = step(level, target, x) @ np.abs(wide).T + 2e-6 * size
    if target is Format.WIDE:
        rounded = step(level, target, w)
        error += np.abs(x) @ rounded.T + step(level, target, x) @ rounded.T
    y, error = activated(y, act), 1.15 * error  # no activation is steeper
    y = y + o if other == "add" else y * o if other == "multiply" else y
    error = error * np.abs(o) if other == "multiply" else error
    assert np.all(np.abs(found - y) <= error + 1e-6)


@on_every_level
@settings(max_examples=25, deadline=None)
@given(
    n_mid=st.integers(1, 4).map(lambda n: 64 * n),
    n_out=st.integers(1, 70),
    n=st.integers(1, 9),
    kind=st.sampled_from([ggml.Type.F16, ggml.Type.Q8_0]),
)
def test_layers_hand_over_what_preparing_would_give(
    level: Kernels, n_mid: int, n_out: int, n: int, kind: ggml.Type
) -> None:
    rng = np.random.default_rng(n_mid * n)
    first, _ = stored(rng.standard_normal((n_mid, 64), dtype=np.float32), kind)
    second, _ = stored(rng.standard_normal((n_out, n_mid), dtype=np.float32), kind)
    x = rng.standard_normal((n, 64), dtype=np.float32)
    inputs: list[Input] = [
        (kind, (64, n_mid), first), (kind, (n_mid, n_out), second), (ggml.Type.F32, (64, n), x)
    ]  # fmt: skip
    target = level.formats[kind]

    def build(direct: bool) -> Any:
        def layers(g: Graph, tensors: list[Tensor]) -> Tensor:
            one, two, columns = tensors
            columns = made(
                g, level, level.prepare, target, 64, n, (columns,), KernelParams(choice=target << 16)
            )
            between = target if direct else Format.F32
            params = KernelParams(choice=1 | between << 16)
            columns = made(g, level, level.linear, between, n_mid, n, (one, columns), params)
            if not direct:
                params = KernelParams(choice=target << 16)
                columns = made(g, level, level.prepare, target, n_mid, n, (columns,), params)
            return made(g, level, level.linear, Format.F32, n_out, n, (two, columns), KernelParams())

        return layers

    assert np.array_equal(run(build(True), inputs), run(build(False), inputs))


@on_every_level
@settings(max_examples=60, deadline=None)
@given(
    runs=st.lists(
        st.tuples(st.integers(1, 3), st.integers(1, 90).map(lambda n: 4 * n)), min_size=1, max_size=3
    ),
    head_dim=st.one_of(st.sampled_from([40, 64, 72, 80, 104, 128]), st.integers(1, 128)),
    n_head=st.integers(1, 3),
    spread=st.sampled_from([0.1, 1.0, 8.0]),
    threads=st.integers(1, 3),
    queries=st.sampled_from([0, 0, 1, 7, 40]),
)
def test_attention(
    level: Kernels,
    runs: list[tuple[int, int]],
    head_dim: int,
    n_head: int,
    spread: float,
    threads: int,
    queries: int,
) -> None:
    n = sum(count * size for count, size in runs)
    rng = np.random.default_rng(n + head_dim)
    q, k, v = (rng.standard_normal((m, n_head, head_dim), dtype=np.float32) for m in (queries or n, n, n))
    q = q * np.float32(spread)
    runs = [(1, queries)] if queries else runs
    scale = float(1 / np.sqrt(head_dim))
    inputs: list[Input] = [(ggml.Type.F32, (head_dim, n_head, len(x)), x) for x in (q, k, v)]

    def build(g: Graph, tensors: list[Tensor]) -> Tensor:
        shape = (head_dim * n_head, len(q))
        return g.custom(level.attention, ggml.Type.F32, shape, tensors, _attention_params(runs, scale))

    found = run(build, inputs, threads).reshape(len(q), n_head, head_dim)
    flat = [(x.transpose(1, 0, 2).reshape(-1, head_dim)) for x in (q, k)]
    dq, dk = (step(level, Format.WIDE, x).reshape(n_head, -1, head_dim) for x in flat)
    start = 0
    for count, size in runs:
        for _ in range(count):
            part = slice(start, start + size)
            keys = slice(None) if queries else part
            scores = np.einsum("ihd,jhd->hij", q[part], k[keys], dtype=np.float64) * scale
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            expected = np.einsum("hij,jhd->ihd", weights, v[keys], dtype=np.float64)
            size_of = np.einsum("hij,jhd->ihd", weights, np.abs(v[keys]), dtype=np.float64)
            # what rounding q and k may move a score by, which moves its weight by that part
            moved = np.einsum("hid,jhd->hij", dq[:, part], np.abs(k[keys])) * scale
            moved += np.einsum("ihd,hjd->hij", np.abs(q[part]), 1.01 * dk[:, keys]) * scale
            worst = 2 * moved.max(-1).T[..., None]
            rounding = STEP[arithmetic(level, Format.WIDE)]
            largest = np.abs(v[keys]).max() if arithmetic(level, Format.WIDE) == "integers" else size_of
            bound = np.expm1(worst) * size_of + 4 * rounding * largest + 1e-5
            assert np.all(np.abs(found[part] - expected) <= bound)
            start += size


@on_every_level
@settings(max_examples=30, deadline=None)
@given(
    n_in=st.integers(2, 300),
    n=st.integers(1, 9),
    shift=st.sampled_from([0.0, 100.0]),
    rms=st.booleans(),
    bias=st.booleans(),
)
def test_norm(level: Kernels, n_in: int, n: int, shift: float, rms: bool, bias: bool) -> None:
    rng = np.random.default_rng(n_in * 10 + n)
    x = (rng.standard_normal((n, n_in)) + shift).astype(np.float32)
    weight, b = rng.standard_normal((2, n_in), dtype=np.float32)
    inputs: list[Input] = [
        (ggml.Type.F32, (n_in, n), x), (ggml.Type.F32, (n_in,), weight), (ggml.Type.F32, (n_in,), b)
    ]  # fmt: skip

    def build(g: Graph, tensors: list[Tensor]) -> Tensor:
        params = KernelParams(scalar=1e-6, choice=int(rms))
        sources = (*tensors[:2], tensors[2] if bias else None)
        return made(g, level, level.norm, Format.F32, n_in, n, sources, params)

    found = run(build, inputs)
    wide = x.astype(np.float64)
    centred = wide if rms else wide - wide.mean(1, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-6)
    assert np.all(np.abs(found - (normal * weight + (b if bias else 0))) <= 1e-5 * (1 + shift))


@on_every_level
def test_any_number_of_threads_gives_the_same(level: Kernels) -> None:
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((1100, 2, 72), dtype=np.float32) for _ in range(3))
    inputs: list[Input] = [(ggml.Type.F32, (72, 2, 1100), x) for x in (q, k, v)]

    def build(g: Graph, tensors: list[Tensor]) -> Tensor:
        params = _attention_params([(1, 1100)], 0.1)
        return g.custom(level.attention, ggml.Type.F32, (144, 1100), tensors, params)

    one, *others = (run(build, inputs, threads) for threads in (1, 2, 5))
    assert all(np.array_equal(one, other) for other in others)


@on_every_level
@pytest.mark.parametrize("kind", [ggml.Type.F16, ggml.Type.Q8_0, ggml.Type.Q4_K])
def test_any_number_of_threads_multiplies_alike(level: Kernels, kind: ggml.Type) -> None:
    rng = np.random.default_rng(2)
    raw, _ = stored(rng.standard_normal((200, 512), dtype=np.float32), kind)
    x = rng.standard_normal((901, 512), dtype=np.float32)
    target = level.formats[kind]

    def build(g: Graph, tensors: list[Tensor]) -> Tensor:
        params = KernelParams(choice=target << 16)
        columns = made(g, level, level.prepare, target, 512, 901, tensors[1:], params)
        return made(g, level, level.linear, Format.F32, 200, 901, (tensors[0], columns), KernelParams())

    inputs: list[Input] = [(kind, (512, 200), raw), (ggml.Type.F32, (512, 901), x)]
    one, *others = (run(build, inputs, threads) for threads in (1, 2, 5))
    assert all(np.array_equal(one, other) for other in others)


@on_every_level
def test_eight_bit_weights_take_wide_activations(level: Kernels) -> None:
    """As the merger asks for: the activations' rounding is then that of 13 bits."""
    rng = np.random.default_rng(3)
    raw, w = stored(rng.standard_normal((70, 160), dtype=np.float32), ggml.Type.Q8_0)
    x = rng.standard_normal((13, 160), dtype=np.float32)

    def build(g: Graph, tensors: list[Tensor]) -> Tensor:
        kind = Format.WIDE
        columns = made(g, level, level.prepare, kind, 160, 13, tensors[1:], KernelParams(choice=kind << 16))
        params = KernelParams(choice=kind << 24)
        return made(g, level, level.linear, Format.F32, 70, 13, (tensors[0], columns), params)

    found = run(build, [(ggml.Type.Q8_0, (160, 70), raw), (ggml.Type.F32, (160, 13), x)])
    x_step, w_step = step(level, Format.WIDE, x), step(level, Format.WIDE, w)
    error = x_step @ np.abs(w).T + np.abs(x) @ w_step.T + x_step @ w_step.T + 1e-4
    assert np.all(np.abs(found - x.astype(np.float64) @ w.astype(np.float64).T) <= error)


@on_every_level
def test_an_odd_row_keeps_its_last_input(level: Kernels) -> None:
    w, x = np.zeros((1, 7), np.float32), np.zeros((1, 7), np.float32)
    w[0, 6] = x[0, 6] = 1

    def build(g: Graph, tensors: list[Tensor]) -> Tensor:
        kind = Format.WIDE
        columns = made(g, level, level.prepare, kind, 7, 1, tensors[1:], KernelParams(choice=kind << 16))
        return made(g, level, level.linear, Format.F32, 1, 1, (tensors[0], columns), KernelParams())

    found = run(build, [(ggml.Type.F32, (7, 1), w), (ggml.Type.F32, (7, 1), x)])
    assert found.item() == pytest.approx(1, rel=1e-3)


def test_params_match_the_c_struct() -> None:
    params = _attention_params([(2, 12), (1, 4)], 0.5)
    raw = np.frombuffer(ctypes.string_at(ctypes.addressof(params), ctypes.sizeof(params)), np.int64)
    assert raw[2:].tolist() == [2, 12, 1, 4]
