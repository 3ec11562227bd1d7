"""Reading a GGUF file's header: metadata and tensor directory, by ggml's own reader.

The weights themselves are not touched. What ggml's reader leaves unchecked is checked here, so that
a file which is cut short or lies about itself is refused before any of it reaches a graph.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from qvl.runtime.errors import GGUFError
from qvl.runtime.ggml import library as ggml
from qvl.runtime.ggml.skim import refusal

MAGIC: Final = b"GGUF"
_STRING, _ARRAY = 8, 9
# enum gguf_type (gguf.h) to the numpy type of one value
_DTYPES: Final[dict[int, str]] = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4",
    6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_NEWER: Final = "a newer program wrote the file: a newer qvl may read it"
_HINT: Final = "the file is damaged or incomplete: download or convert it again"


@dataclass(frozen=True)
class TensorInfo:
    """One entry of the tensor directory.

    Attributes:
        shape: rows first, as numpy has it (ggml's `ne` reversed).
        offset: bytes from the start of the file.
    """

    name: str
    shape: tuple[int, ...]
    type: ggml.Type
    offset: int
    nbytes: int

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class GGUFFile:
    """The header of a GGUF file.

    Attributes:
        metadata: key to int, float, bool, str or list of these.
        tensors: name to entry, in file order.
        data_offset: where tensor data begins, in bytes.
        n_bytes: size of the file.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    data_offset: int
    alignment: int
    n_bytes: int
    version: int = field(default=3)

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))


def read_gguf(path: str | Path, *, arrays: bool | Collection[str] = True) -> GGUFFile:
    """Read and check the header of a GGUF file.

    Args:
        arrays: read array values: all, none, or those of some keys; the others are left out. A vocabulary
            takes a tenth of a second, its merges as long again.

    Raises:
        GGUFError: not a GGUF file, damaged, cut short, or with tensor types unknown to this ggml.
    """
    path = Path(path)
    n_bytes = _check_magic(path)
    with _opened(path) as (lib, ctx):
        tensors = dict(_tensors(path, lib, ctx, n_bytes))
        metadata = dict(_metadata(lib, ctx, arrays))
        return GGUFFile(
            path=path,
            metadata=metadata,
            tensors=tensors,
            data_offset=lib.gguf_get_data_offset(ctx),
            alignment=lib.gguf_get_alignment(ctx),
            n_bytes=n_bytes,
            version=lib.gguf_get_version(ctx),
        )


def _check_magic(path: Path) -> int:
    try:
        with path.open("rb") as f:
            head = f.read(len(MAGIC))
        n_bytes = path.stat().st_size
    except OSError as e:
        raise GGUFError(
            f"{path}: cannot be read: {e.strerror}", hint="check the path and its permissions"
        ) from e
    if head != MAGIC:
        found = f"begins with {head!r}" if head else "it is empty"
        raise GGUFError(
            f"{path}: not a GGUF file: {found}, expected {MAGIC!r}",
            hint="qvl convert makes GGUF files from a Hugging Face checkpoint",
        )
    return n_bytes


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, int]]:
    lib = ggml.lib()
    ctx = lib.gguf_init_from_file(os.fsencode(path), ggml.GGUFInitParams(no_alloc=True, ctx=None))
    if not ctx:
        if (reason := refusal(path)) is not None:
            raise GGUFError(f"{path}: {reason}", hint=_NEWER)
        raise GGUFError(f"{path}: the GGUF header cannot be read", hint=_HINT)
    try:
        yield lib, ctx
    finally:
        lib.gguf_free(ctx)


def _tensors(path: Path, lib: Any, ctx: int, n_bytes: int) -> Iterator[tuple[str, TensorInfo]]:
    start = lib.gguf_get_data_offset(ctx)
    for i in range(lib.gguf_get_n_tensors(ctx)):
        name = lib.gguf_get_tensor_name(ctx, i).decode("utf-8", "replace")
        kind = lib.gguf_get_tensor_type(ctx, i)
        if kind not in ggml.Type._value2member_map_:
            raise GGUFError(
                f"{path}: tensor {name} has type {kind}, which this version does not know", hint=_NEWER
            )
        ne = (ctypes.c_int64 * ggml.MAX_DIMS).from_address(lib.gguf_get_tensor_ne(ctx, i))
        dims = list(ne)
        while len(dims) > 1 and dims[-1] == 1:
            dims.pop()
        offset, size = start + lib.gguf_get_tensor_offset(ctx, i), lib.gguf_get_tensor_size(ctx, i)
        if offset + size > n_bytes:
            raise GGUFError(
                f"{path}: tensor {name} ends at byte {offset + size}, but the file has {n_bytes}", hint=_HINT
            )
        yield name, TensorInfo(name, tuple(reversed(dims)), ggml.Type(kind), offset, size)


def _metadata(lib: Any, ctx: int, arrays: bool | Collection[str]) -> Iterator[tuple[str, Any]]:
    for i in range(lib.gguf_get_n_kv(ctx)):
        key, kind = lib.gguf_get_key(ctx, i).decode("utf-8", "replace"), lib.gguf_get_kv_type(ctx, i)
        if kind == _STRING:
            yield key, lib.gguf_get_val_str(ctx, i).decode("utf-8", "replace")
        elif kind != _ARRAY:
            yield key, _values(lib.gguf_get_val_data(ctx, i), kind, 1)[0]
        elif arrays if isinstance(arrays, bool) else key in arrays:
            yield key, _array(lib, ctx, i)


def _array(lib: Any, ctx: int, i: int) -> list[Any]:
    kind, n = lib.gguf_get_arr_type(ctx, i), lib.gguf_get_arr_n(ctx, i)
    if kind == _STRING:
        return [lib.gguf_get_arr_str(ctx, i, j).decode("utf-8", "replace") for j in range(n)]
    return _values(lib.gguf_get_arr_data(ctx, i), kind, n) if n else []


def _values(pointer: int, kind: int, n: int) -> list[Any]:
    dtype = np.dtype(_DTYPES[kind])
    return list(np.frombuffer(ctypes.string_at(pointer, n * dtype.itemsize), dtype).tolist())
