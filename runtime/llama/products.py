"""The decoder's matrix products by our own kernels: a backend of llama.cpp's scheduler (`native/backend.c`).

llama.cpp gives a context a backend for each device of kind ACCEL. Ours takes products of many columns, as
prompts have, with weights of the types that the image encoder's kernels know. Products of fewer columns, as
replies have, stay with ggml.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Final

from qvl.runtime.ggml import library as ggml
from qvl.runtime.ggml.devices import cpu_device
from qvl.runtime.native import kernels, library

FEWEST_COLUMNS: Final = 192
"""Columns from which on our kernels pay: packing weights for fewer takes too large a part of the time."""

# `struct qvl_ggml` (backend.h), after the CPU and its buffer type
_OF_CPU: Final = "cpu: "  # found through the CPU's registry
_FUNCTIONS: Final = (
    "ggml_backend_dev_backend_reg",
    "ggml_backend_get_device",
    "ggml_backend_dev_init",
    "ggml_backend_free",
    "ggml_backend_buft_is_host",
    "ggml_backend_cpu_buffer_from_ptr",
    "ggml_backend_graph_compute",
    "cpu: ggml_backend_set_n_threads",
    "cpu: ggml_backend_set_abort_callback",
    "ggml_init",
    "ggml_free",
    "ggml_graph_overhead_custom",
    "ggml_new_graph_custom",
    "ggml_graph_add_node",
    "ggml_graph_n_nodes",
    "ggml_graph_node",
)


def product_types() -> frozenset[ggml.Type]:
    """Types of matrices that are worth more to our kernels than to ggml's repacked ones; none on ARM."""
    level = kernels()
    return frozenset() if level is None or level.name.startswith("neon") else frozenset(level.formats)


@contextmanager
def own_products(wanted: bool) -> Iterator[None]:
    """Give contexts that this thread opens in the body our kernels, if wanted and where the CPU has some."""
    level = kernels() if wanted else None
    lib = _registered() if level is not None else None
    if level is None or lib is None:
        yield
        return
    lib.qvl_backend_choose(level.address, FEWEST_COLUMNS)
    try:
        yield
    finally:
        lib.qvl_backend_choose(None, 0)


@lru_cache(maxsize=1)
def _registered() -> ctypes.CDLL | None:
    """The kernels' library with its backend known to ggml; None where ggml is laid out in another way."""
    lib, g = library(), ggml.lib()
    if lib is None:
        return None
    cpu = cpu_device().handle
    reg = g.ggml_backend_dev_backend_reg(cpu)
    addresses = [cpu, g.ggml_backend_dev_buffer_type(cpu)]
    for name in _FUNCTIONS:
        if name.startswith(_OF_CPU):
            addresses.append(g.ggml_backend_reg_get_proc_address(reg, name.removeprefix(_OF_CPU).encode()))
        else:
            addresses.append(ctypes.cast(getattr(g, name), ctypes.c_void_p).value)
    if not all(addresses):
        return None
    lib.qvl_backend.restype = ctypes.c_void_p
    lib.qvl_backend_choose.argtypes = (ctypes.c_void_p, ctypes.c_int64)
    backend = lib.qvl_backend((ctypes.c_void_p * len(addresses))(*addresses))
    if not backend:
        return None
    g.ggml_backend_register(backend)
    return lib
