"""GGUF tensors in a backend's buffers: mapped from the file on the CPU, copied to any other device."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qvl.runtime.errors import BackendError
from qvl.runtime.ggml import library as ggml
from qvl.runtime.ggml.devices import Device
from qvl.runtime.ggml.gguf import GGUFFile, TensorInfo

_ALIGNMENT: Final = 32  # what ggml's CPU kernels expect of tensor data
_CHUNK: Final = 16 << 20


@dataclass(frozen=True)
class Array:
    """A weight computed at load, rather than stored in the file: float32, rows first."""

    data: NDArray[np.float32]

    @property
    def info(self) -> TensorInfo:
        return TensorInfo("", self.data.shape, ggml.Type.F32, 0, self.data.nbytes)


class Weights:
    """Named tensors with data on a device.

    Args:
        file: the GGUF file.
        stored: name to where its data lies in the file.
        computed: name to data made at load.
        device: where to put them.

    Raises:
        BackendError: the device has too little memory.
    """

    def __init__(
        self, file: GGUFFile, stored: Mapping[str, TensorInfo], computed: Mapping[str, Array], device: Device
    ) -> None:
        self._pointers: dict[str, int] = {}
        self._contexts: list[int] = []
        self._buffers: list[int] = []
        self._keep: list[Any] = []
        self.n_bytes = 0
        with file.path.open("rb") as f:
            # private and writable only so that ctypes can take its address; nothing writes to it
            self._map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
        try:
            mappable = device.is_cpu and all(t.offset % _ALIGNMENT == 0 for t in stored.values())
            place = self._map_tensors if mappable else self._copy_tensors
            place(stored, device)
            self._upload(computed, device)
        except BaseException:
            self.close()
            raise

    def __getitem__(self, name: str) -> int:
        """The `ggml_tensor *` of a name."""
        return self._pointers[name]

    def __contains__(self, name: str) -> bool:
        return name in self._pointers

    def close(self) -> None:
        """Free the buffers; graphs that use them must be closed before."""
        lib = ggml.lib()
        for buffer in self._buffers:
            lib.ggml_backend_buffer_free(buffer)
        for context in self._contexts:
            lib.ggml_free(context)
        self._buffers, self._contexts, self._pointers = [], [], {}
        self._keep.clear()
        self._map.close()

    def _new_context(self, tensors: Mapping[str, TensorInfo]) -> int:
        lib = ggml.lib()
        size = lib.ggml_tensor_overhead() * (len(tensors) + 1)
        context: int = lib.ggml_init(ggml.InitParams(size, None, True))
        self._contexts.append(context)
        for name, info in tensors.items():
            ne = (ctypes.c_int64 * ggml.MAX_DIMS)(
                *reversed(info.shape), *[1] * (ggml.MAX_DIMS - len(info.shape))
            )
            pointer = lib.ggml_new_tensor(
                context, int(info.type), max(1, len(info.shape)), ctypes.addressof(ne)
            )
            lib.ggml_set_name(pointer, name.encode()[: ggml.MAX_NAME - 1])
            self._pointers[name] = pointer
            self.n_bytes += info.nbytes
        return context

    def _map_tensors(self, tensors: Mapping[str, TensorInfo], device: Device) -> None:
        lib = ggml.lib()
        self._new_context(tensors)
        window = (ctypes.c_char * len(self._map)).from_buffer(self._map)
        base = ctypes.addressof(window)
        self._keep.append(window)
        buffer = lib.ggml_backend_cpu_buffer_from_ptr(base, len(self._map))
        lib.ggml_backend_buffer_set_usage(buffer, 1)
        self._buffers.append(buffer)
        for name, info in tensors.items():
            lib.ggml_backend_tensor_alloc(buffer, self._pointers[name], base + info.offset)

    def _copy_tensors(self, tensors: Mapping[str, TensorInfo], device: Device) -> None:
        self._allocate(self._new_context(tensors), device)
        view = np.frombuffer(self._map, np.uint8)
        for name, info in tensors.items():
            self._send(name, view[info.offset : info.offset + info.nbytes])

    def _upload(self, arrays: Mapping[str, Array], device: Device) -> None:
        if not arrays:
            return
        self._allocate(self._new_context({name: a.info for name, a in arrays.items()}), device)
        for name, array in arrays.items():
            self._send(name, np.ascontiguousarray(array.data, np.float32).reshape(-1).view(np.uint8))

    def _allocate(self, context: int, device: Device) -> None:
        lib = ggml.lib()
        buft = lib.ggml_backend_dev_buffer_type(device.handle)
        buffer = lib.ggml_backend_alloc_ctx_tensors_from_buft(context, buft)
        if not buffer:
            need = lib.ggml_backend_alloc_ctx_tensors_from_buft_size(context, buft)
            raise BackendError(
                f"device {device.name} has no room for {need / 1e9:.2f} GB of weights",
                hint="use `device` cpu",
            )
        lib.ggml_backend_buffer_set_usage(buffer, 1)
        self._buffers.append(buffer)

    def _send(self, name: str, data: NDArray[np.uint8]) -> None:
        # in pieces, since a device may stage a transfer in memory of its own
        for start in range(0, data.size, _CHUNK):
            part = data[start : start + _CHUNK]
            ggml.lib().ggml_backend_tensor_set(self._pointers[name], part.ctypes.data, start, part.nbytes)
