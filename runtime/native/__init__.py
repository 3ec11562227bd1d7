"""Kernels of our own for the image encoder on CPUs, at the best level that this processor has.

They are C, compiled when qvl is installed, once for each set of instructions (a level: "avx2", "avxvnni",
"avx512vnni", "avx512bf16", "neon", "neoni8mm"), and run as custom operations in a ggml graph, beside ggml's
own. The environment variable QVL_NATIVE names the level to take instead of the best, or 0 for none.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Any, ClassVar, Literal, TypeAlias

from qvl.runtime.errors import InputError
from qvl.runtime.ggml import library as ggml

Precision: TypeAlias = Literal["auto", "exact"]
"""Our kernels where the CPU has them, or ggml's own operations alone."""


class Format(IntEnum):
    """How the columns of x lie in memory (kernels.h)."""

    F32 = 0
    WIDE = 1
    BYTES = 2


class Activation(IntEnum):
    """What follows a linear layer (kernels.h)."""

    NONE = 0
    SILU = 1
    GELU_ERF = 2
    GELU_TANH = 3
    GELU_QUICK = 4


@dataclass(frozen=True)
class Kernels:
    """A level: addresses of its kernels (each a `ggml_custom_op_t`), and what they take.

    Attributes:
        name: of the level.
        address: of its table (`struct qvl_kernels`).
        max_head: the widest attention head.
        formats: for each type of weights that `linear` takes, the format that it wants x in.
        prepare: converts float32 to a format.
    """

    name: str
    address: int
    attention: int
    linear: int
    norm: int
    prepare: int
    max_head: int
    formats: dict[ggml.Type, Format]
    _row_bytes: Any

    def row_bytes(self, kind: Format, n_in: int) -> int:
        """Bytes of a column of n_in values in a format."""
        return int(self._row_bytes(int(kind), n_in))


class _Level(ctypes.Structure):
    """`struct qvl_kernels` (kernels.h)."""

    _fields_: ClassVar[Any] = (
        ("name", ctypes.c_char_p),
        ("supported", ctypes.CFUNCTYPE(ctypes.c_int)),
        ("attention", ctypes.c_void_p),
        ("linear", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("prepare", ctypes.c_void_p),
        ("max_head", ctypes.c_int),
        ("takes", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)),
        ("row_bytes", ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int, ctypes.c_int64)),
    )


def kernels() -> Kernels | None:
    """The kernels of the best level, or of the one that QVL_NATIVE names; None where there are none.

    Raises:
        InputError: QVL_NATIVE names a level that is unknown, or that this processor or installation lacks.
    """
    wanted = os.environ.get("QVL_NATIVE", "")
    if wanted == "0":
        return None
    found = levels()
    if not wanted:
        return next(iter(found.values()), None)
    if wanted not in found:
        have = f"has {', '.join(found)}" if found else "has none"
        raise InputError(
            f"QVL_NATIVE={wanted}: no such kernels; this processor, as qvl was compiled, {have}",
            hint="unset QVL_NATIVE to take the best, or set it to 0 for ggml's own kernels",
        )
    return found[wanted]


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where the installation has none."""
    spec = importlib.util.find_spec("qvl.runtime.native._kernels")
    if spec is None or spec.origin is None:
        return None
    try:
        return ctypes.CDLL(spec.origin)
    except OSError:
        return None


@lru_cache(maxsize=1)
def levels() -> dict[str, Kernels]:
    """Every level that was compiled and that this processor has, best first."""
    lib = library()
    if lib is None:
        return {}
    lib.qvl_level.restype = ctypes.POINTER(_Level)
    found = {}
    index = 0
    while level := lib.qvl_level(index):
        index += 1
        if level.contents.supported():
            kernels = _kernels(level.contents)
            found[kernels.name] = kernels
    return found


def _kernels(level: _Level) -> Kernels:
    formats = {kind: level.takes(int(kind)) for kind in ggml.Type}
    return Kernels(
        name=level.name.decode(),
        address=ctypes.addressof(level),
        attention=level.attention,
        linear=level.linear,
        norm=level.norm,
        prepare=level.prepare,
        max_head=level.max_head,
        formats={kind: Format(value) for kind, value in formats.items() if value},
        _row_bytes=level.row_bytes,
    )
