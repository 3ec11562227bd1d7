"""Kernels of our own for CPUs with AVX512_BF16, where ggml's leave the most on the table.

They are C, compiled when qvl is installed, and run as custom operations in a ggml graph, beside ggml's
own. Where they were not compiled, or the CPU lacks the instructions, `kernels()` is None.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from dataclasses import dataclass
from functools import lru_cache

from qvl.runtime.ggml import library as ggml


@dataclass(frozen=True)
class Kernels:
    """Addresses of the kernels (each a `ggml_custom_op_t`), and what they take.

    Attributes:
        max_head: the widest attention head.
        types: types of weights for `linear`.
    """

    attention: int
    linear: int
    layer_norm: int
    max_head: int
    types: frozenset[ggml.Type]


@lru_cache(maxsize=1)
def kernels() -> Kernels | None:
    """The kernels, or None where there are none for this machine (or QVL_NATIVE=0)."""
    spec = importlib.util.find_spec("qvl.runtime.native._kernels")
    if spec is None or spec.origin is None or os.environ.get("QVL_NATIVE") == "0":
        return None
    try:
        lib = ctypes.CDLL(spec.origin)
    except OSError:
        return None
    max_head = int(lib.qvl_attention_max_head())
    if not max_head:
        return None

    def address(name: str) -> int:
        return ctypes.cast(getattr(lib, name), ctypes.c_void_p).value or 0

    return Kernels(
        attention=address("qvl_attention"),
        linear=address("qvl_linear"),
        layer_norm=address("qvl_layer_norm"),
        max_head=max_head,
        types=frozenset(kind for kind in ggml.Type if lib.qvl_linear_takes(int(kind))),
    )
