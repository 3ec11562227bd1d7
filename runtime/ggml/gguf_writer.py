"""Writes GGUF files whose data is at hand: importance matrices, and files spliced from two others.

(A checkpoint's conversion streams its tensors and has its own writer, qvl.convert.writer.)
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from qvl.runtime.atomic import replacing, write_error
from qvl.runtime.ggml import library as ggml
from qvl.runtime.ggml.gguf import GGUFFile, TensorInfo

_ALIGNMENT: Final = 32  # GGUF_DEFAULT_ALIGNMENT
Value = int | str | list[str]


def write_gguf(
    path: Path,
    metadata: Mapping[str, Value],
    tensors: Iterable[tuple[TensorInfo, memoryview]],
    base: GGUFFile | None = None,
) -> None:
    """Write a file that appears whole or not at all.

    Args:
        metadata: added to that of `base`; numbers become uint32.
        tensors: each with its bytes; name, shape and type of the entry are used.
        base: a file whose metadata is taken over.

    Raises:
        OutputError: the disk is full, or the folder cannot be written.
    """
    entries = list(tensors)
    header = _header(metadata, [info for info, _ in entries], base)
    try:
        with replacing(path) as file:
            file.write(header)
            for _, data in entries:
                file.write(data)
                file.write(bytes(-len(data) % _ALIGNMENT))
    except OSError as error:
        raise write_error(path, error) from error


def splice(base: GGUFFile, donor: GGUFFile, taken: Callable[[str], bool], path: Path) -> None:
    """Write `base` with those of its tensors replaced by `donor`'s whose names are `taken`.

    Both files must hold the same tensors by name and shape; types may differ.

    Raises:
        OutputError: the disk is full, or the folder cannot be written.
    """
    data = [np.memmap(file.path, np.uint8, "r") for file in (base, donor)]
    entries = []
    for name in base.tensors:
        which = int(taken(name))
        info = (base, donor)[which].tensors[name]
        entries.append((info, data[which][info.offset : info.offset + info.nbytes].data))
    write_gguf(path, {}, entries, base)


def _header(metadata: Mapping[str, Value], tensors: list[TensorInfo], base: GGUFFile | None) -> bytes:
    lib = ggml.lib()
    out = lib.gguf_init_empty()
    context = lib.ggml_init(ggml.InitParams(lib.ggml_tensor_overhead() * (len(tensors) + 1), None, True))
    try:
        if base is not None:
            source = lib.gguf_init_from_file(os.fsencode(base.path), ggml.GGUFInitParams(True, None))
            lib.gguf_set_kv(out, source)
            lib.gguf_free(source)
        for key, value in metadata.items():
            _set(lib, out, key.encode(), value)
        for info in tensors:
            ne = (ctypes.c_int64 * ggml.MAX_DIMS)(*reversed(info.shape), *[1] * (4 - len(info.shape)))
            tensor = lib.ggml_new_tensor(context, int(info.type), len(info.shape), ctypes.addressof(ne))
            lib.ggml_set_name(tensor, info.name.encode())
            lib.gguf_add_tensor(out, tensor)
        data = ctypes.create_string_buffer(lib.gguf_get_meta_size(out))
        lib.gguf_get_meta_data(out, ctypes.addressof(data))
        return data.raw
    finally:
        lib.ggml_free(context)
        lib.gguf_free(out)


def _set(lib: Any, out: int, key: bytes, value: Value) -> None:
    if isinstance(value, int):
        lib.gguf_set_val_u32(out, key, value)
    elif isinstance(value, str):
        lib.gguf_set_val_str(out, key, value.encode())
    else:
        strings = (ctypes.c_char_p * len(value))(*(v.encode() for v in value))
        lib.gguf_set_arr_str(out, key, ctypes.addressof(strings), len(value))
