"""Building a ggml graph, so that the code of a model reads like the paper.

Shapes here are ggml's `ne`: the axis that lies contiguous in memory comes first. A matrix product is
written `w @ x` with w [n_in, n_out] and x [n_in, n], giving [n_out, n] (`ggml_mul_mat`).

ggml aborts the process on shapes that do not fit; every operation here checks its operands first and
raises ValueError instead.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from qvl.runtime.errors import BackendError
from qvl.runtime.ggml import library as ggml

ROPE_TYPE_VISION: Final = 24
PREC_F32: Final = 10
_NUMPY: Final[dict[ggml.Type, Any]] = {
    ggml.Type.F32: np.float32,
    ggml.Type.F16: np.float16,
    ggml.Type.I32: np.int32,
}


class KernelParams(ctypes.Structure):
    """What every kernel of ours begins its userdata with."""

    _fields_: ClassVar[Any] = (
        ("failed", ctypes.c_int32),
        ("scalar", ctypes.c_float),
        ("choice", ctypes.c_int32),
        ("next", ctypes.c_int32),
    )


class Tensor:
    """A node of a graph, or a weight: a `ggml_tensor *` and the graph whose context new nodes go to."""

    __slots__ = ("graph", "pointer", "shape", "type")

    def __init__(self, graph: Graph, pointer: int) -> None:
        struct = ggml.tensor(pointer)
        self.graph = graph
        self.pointer = pointer
        self.shape: tuple[int, int, int, int] = tuple(struct.ne)
        self.type = ggml.Type(struct.type)

    @property
    def strides(self) -> tuple[int, int, int, int]:
        """Bytes from one element to the next along each axis."""
        return tuple(ggml.tensor(self.pointer).nb)

    def __matmul__(self, x: Tensor) -> Tensor:
        _check(self.shape[0] == x.shape[0], "matmul", self, x)
        _check(x.shape[2] % self.shape[2] == 0 and x.shape[3] % self.shape[3] == 0, "matmul", self, x)
        return self.graph.op("ggml_mul_mat", self, x)

    def __add__(self, other: Tensor) -> Tensor:
        _check(all(a % b == 0 for a, b in zip(self.shape, other.shape, strict=True)), "add", self, other)
        return self.graph.op("ggml_add", self, other)

    def __mul__(self, other: Tensor) -> Tensor:
        _check(all(a % b == 0 for a, b in zip(self.shape, other.shape, strict=True)), "mul", self, other)
        return self.graph.op("ggml_mul", self, other)

    def norm(self, eps: float) -> Tensor:
        """Zero mean and unit variance along the first axis."""
        return self.graph.op("ggml_norm", self, eps)

    def rms_norm(self, eps: float) -> Tensor:
        """Unit mean square along the first axis."""
        return self.graph.op("ggml_rms_norm", self, eps)

    def gelu(self) -> Tensor:
        """x Φ(x), exact; in place."""
        return self.graph.op("ggml_gelu_erf_inplace", self)

    def gelu_tanh(self) -> Tensor:
        """GELU in its tanh approximation, in float32; ggml's own goes through a float16 table on the CPU.

        With u = c x (1 + 0.044715 x²) and c = 2 √(2/π) it is x σ(u), which is silu(u) · x / u.
        """
        c = 2 * math.sqrt(2 / math.pi)
        ratio = self.graph.op("ggml_scale_bias_inplace", self * self, 0.044715 * c, c)  # u / x
        return self.graph.op("ggml_div_inplace", (self * ratio).silu(), ratio)

    def silu(self) -> Tensor:
        """x σ(x); in place."""
        return self.graph.op("ggml_silu_inplace", self)

    def rows(self, indices: Tensor) -> Tensor:
        """The rows of these indices, int32 [n], in float32; callers bound the indices."""
        _check(indices.type is ggml.Type.I32 and self.shape[2] == self.shape[3] == 1, "rows", self, indices)
        return self.graph.op("ggml_get_rows", self, indices)

    def cont(self) -> Tensor:
        """A contiguous copy."""
        return self.graph.op("ggml_cont", self)

    def cast(self, kind: ggml.Type) -> Tensor:
        """A contiguous copy of another type."""
        return self if kind is self.type else self.graph.op("ggml_cast", self, int(kind))

    def pad(self, n: int) -> Tensor:
        """n zeros more along the first axis."""
        return self.graph.op("ggml_pad", self, n, 0, 0, 0) if n else self

    def concat(self, other: Tensor, axis: int) -> Tensor:
        same = all(a == b for i, (a, b) in enumerate(zip(self.shape, other.shape, strict=True)) if i != axis)
        _check(same and self.type is other.type, "concat", self, other)
        return self.graph.op("ggml_concat", self, other, axis)

    def reshape(self, *shape: int) -> Tensor:
        ne = _four(shape)
        _check(math.prod(ne) == math.prod(self.shape), f"reshape to {ne}", self)
        return self.graph.op("ggml_reshape_4d", self, *ne)

    def permute(self, *axes: int) -> Tensor:
        """Axis i becomes axis axes[i], without a copy (ggml's convention, the inverse of numpy's)."""
        _check(sorted(axes) == [0, 1, 2, 3], f"permute {axes}", self)
        return self.graph.op("ggml_permute", self, *axes)

    def view(self, shape: Sequence[int], strides: Sequence[int], offset: int = 0) -> Tensor:
        """A window on the data: shape in elements, strides (of axes 1 to 3) and offset in bytes."""
        ne = _four(shape)
        steps = [*strides, *[strides[-1]] * (3 - len(strides))]
        return self.graph.op("ggml_view_4d", self, *ne, *steps, offset)

    def softmax(self, scale: float) -> Tensor:
        """softmax(scale · x) along the first axis."""
        return self.graph.op("ggml_soft_max_ext", self, None, scale, 0.0)

    def rope_vision(self, positions: Tensor, sections: Sequence[int], base: float = 10000.0) -> Tensor:
        """2D rotary positions (Qwen2-VL, section 2.1; `ggml_rope_multi`, mode vision).

        self is [head_dim, n_head, n]; positions int32 [4 n]: n heights, n widths, 2 n zeros.
        """
        _check(positions.shape[0] == 4 * self.shape[2], "rope_vision", self, positions)
        array = (ctypes.c_int * 4)(*sections)
        n_dims = self.shape[0] // 2
        return self.graph.op(
            "ggml_rope_multi", self, positions, None, n_dims, ctypes.addressof(array),
            ROPE_TYPE_VISION, 32768, base, 1.0, 0.0, 1.0, 32.0, 1.0,
        )  # fmt: skip

    def flash_attention(self, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """softmax(scale · q kᵀ) v over [head_dim, n, n_head, batch], giving [head_dim, n_head, n, batch]."""
        _check(
            self.shape[0] == k.shape[0] and k.shape == v.shape and k.type is v.type,
            "flash_attention",
            self,
            k,
            v,
        )
        out = self.graph.op("ggml_flash_attn_ext", self, k, v, None, scale, 0.0, 0.0)
        ggml.lib().ggml_flash_attn_ext_set_prec(out.pointer, PREC_F32)
        return out


class Graph:
    """A ggml graph: nodes without data until a `Runner` places them.

    Args:
        max_nodes: room for this many nodes, weights and views included.
    """

    def __init__(self, max_nodes: int) -> None:
        lib = ggml.lib()
        self.max_nodes = max_nodes
        size = lib.ggml_tensor_overhead() * (max_nodes + 8) + lib.ggml_graph_overhead_custom(max_nodes, False)
        self.context: int | None = lib.ggml_init(ggml.InitParams(size, None, True))
        if not self.context:
            raise BackendError(f"ggml cannot reserve {size} bytes for a graph", hint="free some memory")
        self.pointer = lib.ggml_new_graph_custom(self.context, max_nodes, False)
        self._n_nodes = 0
        self._params: list[KernelParams] = []

    def op(self, name: str, *args: Any) -> Tensor:
        """The node made by the ggml function of that name; tensors are passed by their pointers."""
        self._n_nodes += 1
        if self._n_nodes > self.max_nodes:
            raise BackendError(
                f"the graph has more than {self.max_nodes} nodes", hint="encode fewer pictures at once"
            )
        values = [a.pointer if isinstance(a, Tensor) else a for a in args]
        return Tensor(self, getattr(ggml.lib(), name)(self.context, *values))

    def custom(
        self,
        kernel: int,
        kind: ggml.Type,
        shape: Sequence[int],
        sources: Sequence[Tensor | None],
        params: KernelParams,
    ) -> Tensor:
        """A node computed by a function of ours on the CPU (`ggml_custom_4d`).

        Args:
            kernel: address of a `ggml_custom_op_t`.
            sources: what it reads, None for one that it does without.
            params: what it gets as userdata; kept as long as the graph.
        """
        array = (ctypes.c_void_p * len(sources))(*[None if t is None else t.pointer for t in sources])
        self._params.append(params)
        return self.op(
            "ggml_custom_4d", int(kind), *_four(shape), ctypes.addressof(array), len(sources),
            kernel, -1, ctypes.addressof(params),
        )  # fmt: skip

    def take_failure(self) -> bool:
        """Whether one of our own kernels gave up since the last call, for want of memory."""
        failed = any(params.failed for params in self._params)
        for params in self._params:
            params.failed = 0
        return failed

    def input(self, kind: ggml.Type, *shape: int) -> Tensor:
        """A tensor to be filled before each run."""
        array = (ctypes.c_int64 * 4)(*_four(shape))
        tensor = self.op("ggml_new_tensor", int(kind), 4, ctypes.addressof(array))
        ggml.lib().ggml_set_input(tensor.pointer)
        return tensor

    def weight(self, pointer: int) -> Tensor:
        """A tensor that lives in another context, with data of its own."""
        return Tensor(self, pointer)

    def name(self, tensor: Tensor, name: str) -> Tensor:
        """Name a node, so that a watcher can tell it."""
        ggml.lib().ggml_set_name(tensor.pointer, name.encode())
        return tensor

    def output(self, tensor: Tensor) -> Tensor:
        """Mark the result, and add all it depends on to the graph."""
        ggml.lib().ggml_set_output(tensor.pointer)
        ggml.lib().ggml_build_forward_expand(self.pointer, tensor.pointer)
        return tensor

    def nodes(self) -> list[int]:
        """All nodes in the order in which they are computed: `ggml_tensor *` each."""
        lib = ggml.lib()
        return [lib.ggml_graph_node(self.pointer, i) for i in range(lib.ggml_graph_n_nodes(self.pointer))]

    def close(self) -> None:
        if self.context:
            ggml.lib().ggml_free(self.context)
            self.context = None


@contextmanager
def piece(nodes: Sequence[int]) -> Iterator[int]:
    """A graph of neighbouring nodes of a placed one: `ggml_cgraph *`, as long as the body runs."""
    lib = ggml.lib()
    size = lib.ggml_graph_overhead_custom(len(nodes), False) + 1024
    context = lib.ggml_init(ggml.InitParams(size, None, True))
    try:
        pointer = lib.ggml_new_graph_custom(context, len(nodes), False)
        for node in nodes:
            lib.ggml_graph_add_node(pointer, node)
        yield pointer
    finally:
        lib.ggml_free(context)


def set_data(tensor: Tensor, data: NDArray[Any]) -> None:
    """Fill a placed tensor from a contiguous array of its type and size."""
    array = np.ascontiguousarray(data, dtype=_NUMPY[tensor.type])
    _check(array.size == math.prod(tensor.shape), f"set from {array.shape}", tensor)
    ggml.lib().ggml_backend_tensor_set(tensor.pointer, array.ctypes.data, 0, array.nbytes)


def get_data(tensor: Tensor) -> NDArray[np.float32]:
    """A float32 tensor's data, rows first: [ne1, ne0] for a matrix."""
    _check(tensor.type is ggml.Type.F32, "get", tensor)
    out = np.empty(tuple(reversed(tensor.shape)), np.float32)
    ggml.lib().ggml_backend_tensor_get(tensor.pointer, out.ctypes.data, 0, out.nbytes)
    return out.reshape(out.shape[-2:]) if out.ndim == 4 and out.shape[:2] == (1, 1) else out


def _four(shape: Sequence[int]) -> tuple[int, ...]:
    return (*shape, *([1] * (4 - len(shape))))


def _check(ok: bool, what: str, *tensors: Tensor) -> None:
    if not ok:
        raise ValueError(
            f"{what}: {' and '.join(f'{t.type.name}{list(t.shape)}' for t in tensors)} do not fit"
        )
