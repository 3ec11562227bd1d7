"""What ggml's CPU backend was compiled with."""

from __future__ import annotations

import ctypes
from functools import lru_cache

from qvl.runtime.ggml import library as ggml
from qvl.runtime.ggml.devices import cpu_device


class _Feature(ctypes.Structure):
    """`struct ggml_backend_feature` (ggml-backend.h)."""

    _fields_ = (("name", ctypes.c_char_p), ("value", ctypes.c_char_p))


@lru_cache(maxsize=1)
def cpu_features() -> tuple[str, ...]:
    """Names of instruction sets and build options (`ggml_backend_get_features`)."""
    lib = ggml.lib()
    reg = lib.ggml_backend_dev_backend_reg(cpu_device().handle)
    address = lib.ggml_backend_reg_get_proc_address(reg, b"ggml_backend_get_features")
    if not address:
        return ()
    # ggml_backend_feature * ggml_backend_get_features(ggml_backend_reg_t reg), ended by a null name
    get = ctypes.CFUNCTYPE(ctypes.POINTER(_Feature), ctypes.c_void_p)(address)
    found, i, names = get(reg), 0, []
    while found[i].name:
        if found[i].value != b"0":
            names.append(found[i].name.decode())
        i += 1
    return tuple(names)
