"""Quantizers for Q4_K, Q5_K and Q6_K with libggml's own bytes, about ten times as fast.

libggml's search for the scales of a block is written for one block at a time, and compiled for any x86-64.
Ours (kquants.c) does eight or sixteen blocks at once with AVX2 or AVX-512. A last bit depends on how libggml
was compiled, so that each type is held against libggml before it is used; where one differs, or was not
compiled, libggml does the work.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qvl.runtime.ggml import library as ggml
from qvl.runtime.ggml.library import Type

_TYPES: Final = (Type.Q4_K, Type.Q5_K, Type.Q6_K)
_BLOCK: Final = 256


@dataclass(frozen=True)
class KQuants:
    """The compiled quantizer.

    Attributes:
        level: instructions it uses: 1 for AVX2, 2 for AVX-512.
        types: those whose bytes are libggml's.
    """

    _lib: ctypes.CDLL
    level: int
    types: frozenset[Type]

    def quantize(
        self,
        kind: Type,
        values: NDArray[np.float32],
        out: NDArray[np.uint8],
        importance: NDArray[np.float32] | None = None,
    ) -> None:
        """Rows of values [n_rows, n_per_row] into out, as `ggml_quantize_chunk` does.

        Raises:
            ValueError: a type, row or buffer that does not fit.
        """
        n_rows, n_per_row = values.shape
        if kind not in _TYPES or out.nbytes != n_rows * ggml.row_size(kind, n_per_row):
            raise ValueError(f"{kind.name}: {out.nbytes} bytes for {values.shape}")
        if importance is not None and importance.shape != (n_per_row,):
            raise ValueError(f"importance {importance.shape} for rows of {n_per_row}")
        weights = None if importance is None else importance.ctypes.data
        done = self._lib.qvl_kquants(
            int(kind), values.ctypes.data, out.ctypes.data, n_rows, n_per_row, weights, self.level
        )
        if not done:
            raise ValueError(f"{kind.name} of {values.shape} cannot be quantized at level {self.level}")


@lru_cache(maxsize=1)
def kquants() -> KQuants | None:
    """The quantizer, or None where there is none for this machine (or QVL_NATIVE=0)."""
    found = compiled()
    if found is None or os.environ.get("QVL_NATIVE") == "0":
        return None
    types = frozenset(kind for kind in _TYPES if _agrees(found, kind))
    return KQuants(found._lib, found.level, types) if types else None


def compiled(level: int | None = None) -> KQuants | None:
    """The quantizer, not yet checked against libggml; for one instruction set, or the CPU's best."""
    spec = importlib.util.find_spec("qvl.convert.native._kquants")
    if spec is None or spec.origin is None:
        return None
    try:
        lib = ctypes.CDLL(spec.origin)
    except OSError:
        return None
    # int qvl_kquants(int type, const float * x, uint8_t * out, int64_t n_rows, int64_t n_per_row,
    #                 const float * importance, int wanted)
    c_int, pointer, size = ctypes.c_int, ctypes.c_void_p, ctypes.c_int64
    lib.qvl_kquants.argtypes = [c_int, pointer, pointer, size, size, pointer, c_int]
    best = int(lib.qvl_kquants_level())
    wanted = best if level is None else level
    return KQuants(lib, wanted, frozenset(_TYPES)) if 0 < wanted <= best else None


def _agrees(found: KQuants, kind: Type) -> bool:
    """True if rows of many kinds give libggml's bytes, with and without an importance matrix."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((33, _BLOCK)) * 10.0 ** rng.uniform(-6, 2, (33, 1))
    values[1] = 0
    values[2] = np.abs(values[2])
    values[3] *= np.repeat(10.0 ** rng.uniform(-9, 0, 16), 16)
    values[4] = np.repeat(values[4, ::32], 32)
    values[5, rng.random(_BLOCK) < 0.9] = 0
    rows = values.astype(np.float32)
    importance = (rng.standard_normal(_BLOCK) ** 2).astype(np.float32)
    return all(
        np.array_equal(by_libggml(kind, rows, weights), _by(found, kind, rows, weights))
        for weights in (None, importance)
    )


def by_libggml(
    kind: Type, values: NDArray[np.float32], importance: NDArray[np.float32] | None
) -> NDArray[np.uint8]:
    """The bytes of rows that `ggml_quantize_chunk` gives."""
    out = _room(kind, values)
    weights: Any = None if importance is None else importance.ctypes.data
    ggml.lib().ggml_quantize_chunk(int(kind), values.ctypes.data, out.ctypes.data, 0, *values.shape, weights)
    return out


def _by(
    found: KQuants, kind: Type, values: NDArray[np.float32], importance: NDArray[np.float32] | None
) -> NDArray[np.uint8]:
    out = _room(kind, values)
    found.quantize(kind, values, out, importance)
    return out


def _room(kind: Type, values: NDArray[np.float32]) -> NDArray[np.uint8]:
    return np.zeros(values.shape[0] * ggml.row_size(kind, values.shape[1]), np.uint8)
