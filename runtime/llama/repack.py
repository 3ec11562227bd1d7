"""The decision whether llama.cpp copies matrices into the order that its older CPU kernels like.

It does so by default, for Q4_K and some others. Matrices that stay as the file has them are multiplied by
our own kernels (`products`), or by ggml's tiled int8 product for K-quants (ggml/src/ggml-cpu/tiled). With
AVX512_VNNI to run that, the 2B as Q4_K_M reads prompts 1.7 times as fast as from copies, but one token
after the other comes at 0.8 of the speed (benchmarks/README.md). So it depends on what is to be fast,
`Optimize`: a conversation waits for its replies; captions are mostly prompts, with several replies at a
time. Without copies there is also no second set of the weights.

Where it does copy, the mapped file stays beside the copies: 1.67 GB for the 2B, and 1.07 GB if it were read
without a map. It is mapped all the same: the difference is pages of the file, which the system takes back
when memory is short; reading took one to two seconds longer.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Collection, Iterator
from functools import lru_cache
from typing import Final, Literal, TypeAlias

from qvl.runtime.ggml import library as ggml
from qvl.runtime.ggml.devices import cpu_device
from qvl.runtime.ggml.features import cpu_features
from qvl.runtime.ggml.gguf import GGUFFile, TensorInfo
from qvl.runtime.ggml.graph import Graph
from qvl.runtime.ggml.library import Type

Optimize: TypeAlias = Literal["decode", "prefill"]
"""One token after the other, or many at once, of prompts and of several replies."""

_TILED: Final = frozenset({Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K})


def wants_repacking(
    gguf: GGUFFile, optimize: Optimize = "decode", own: Collection[Type] = frozenset()
) -> bool:
    """Decide whether llama.cpp uses the CPU's "extra" buffers (`use_extra_bufts`) for this file.

    It does not if prompts are to be fast and every matrix that it would copy is of a type that is faster as
    the file has it. It never does on a CPU with AMX: as GCC compiles ggml's AMX kernels, they load a tile
    configuration that was never stored, a fault that ends the process (llama.cpp issues 20824 and 26954, open
    in version 0.5.0).

    Args:
        own: types that our own kernels multiply.
    """
    features = cpu_features()
    if "AMX_INT8" in features:
        return False
    kept = {*own, *(_TILED if "AVX512_VNNI" in features else ())}
    if optimize == "decode" or not kept:
        return True
    return any(t.type not in kept and _is_repacked(t.type, *t.shape) for t in _products(gguf))


def repacked_bytes(gguf: GGUFFile, optimize: Optimize = "decode") -> int:
    """Bytes of weights that llama.cpp copies into the CPU's "extra" buffers (src/llama-model.cpp)."""
    if not wants_repacking(gguf, optimize):
        return 0
    return sum(t.nbytes for t in _products(gguf) if _is_repacked(t.type, *t.shape))


def _products(gguf: GGUFFile) -> Iterator[TensorInfo]:
    """Matrices of products. A tied embedding is one of them; the file's own rows also serve look-ups."""
    tied = "output.weight" not in gguf.tensors
    for name, tensor in gguf.tensors.items():
        if len(tensor.shape) == 2 and (tied or name != "token_embd.weight"):
            yield tensor


@lru_cache(maxsize=1024)
def _is_repacked(kind: Type, rows: int, columns: int) -> bool:
    """Ask the CPU's extra buffers whether they take a matrix of this type and shape for products."""
    lib, device = ggml.lib(), cpu_device().handle
    registry = lib.ggml_backend_dev_backend_reg(device)
    address = lib.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    if not address:
        return False
    # ggml_backend_buffer_type_t * ggml_backend_dev_get_extra_bufts(ggml_backend_dev_t device)
    listed = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)(device)
    graph = Graph(max_nodes=8)
    try:
        weight, x = graph.input(kind, columns, rows), graph.input(Type.F32, columns, 512)
        node = weight @ x
        for buffer_type in itertools.takewhile(bool, listed):
            buffer = lib.ggml_backend_buft_alloc_buffer(buffer_type, 0)
            ggml.tensor(weight.pointer).buffer = buffer
            taken = lib.ggml_backend_dev_supports_op(device, node.pointer)
            lib.ggml_backend_buffer_free(buffer)
            if taken:
                return True
        return False
    finally:
        graph.close()
