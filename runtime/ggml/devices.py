"""Compute devices by name: the CPU, a GPU of this machine, or ggml's RPC server elsewhere."""

from __future__ import annotations

import ctypes
import socket
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

from qvl.runtime.errors import BackendError, InputError, check_text
from qvl.runtime.ggml import library as ggml


class DeviceKind(IntEnum):
    """`enum ggml_backend_dev_type` (ggml-backend.h)."""

    CPU = 0
    GPU = 1
    IGPU = 2
    ACCEL = 3
    META = 4


@dataclass(frozen=True)
class Device:
    """A device that ggml knows.

    Attributes:
        name: ggml's name: "CPU", "CUDA0", "Metal", "RPC0[127.0.0.1:50052]".
        handle: the `ggml_backend_dev_t`.
    """

    name: str
    description: str
    kind: DeviceKind
    handle: int

    @property
    def is_cpu(self) -> bool:
        return self.kind is DeviceKind.CPU

    def memory(self) -> tuple[int, int]:
        """Free and total bytes, as the device reports them."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        ggml.lib().ggml_backend_dev_memory(self.handle, ctypes.addressof(free), ctypes.addressof(total))
        return free.value, total.value


def devices() -> list[Device]:
    """Every registered device, in ggml's order."""
    _load_backends()
    lib = ggml.lib()
    return [_device(lib.ggml_backend_dev_get(i)) for i in range(lib.ggml_backend_dev_count())]


def find_device(name: str = "auto") -> Device:
    """The device of a name.

    Args:
        name: "auto" (the first GPU, else the CPU), "cpu", "gpu", a name as `devices()` gives it in any
            case ("cuda0", "metal"), or "rpc:HOST:PORT".

    Raises:
        InputError: no device has that name; the message lists those there are.
        BackendError: this build has no RPC backend, or the server does not answer.
    """
    wanted = check_text("device", name).lower()
    if wanted.startswith("rpc:"):
        return _rpc_device(name[4:])
    found = devices()
    # A server that was used once stays registered as a GPU, and may be gone by now: it is used by name alone.
    gpus = [d for d in found if d.kind in (DeviceKind.GPU, DeviceKind.IGPU) and not d.name.startswith("RPC")]
    if wanted == "auto":
        return (gpus or [cpu_device()])[0]
    if wanted == "gpu" and gpus:
        return gpus[0]
    for device in found:
        if wanted in (device.name.lower(), device.name.lower().rstrip("0")):
            return device
    names = ", ".join(d.name.lower() for d in found)
    raise InputError(
        f"no device {name!r}: this build of llama-cpp-python has {names}", hint="use `device` cpu"
    )


def cpu_device() -> Device:
    """The CPU, which is always there."""
    return next(d for d in devices() if d.is_cpu)


def _device(handle: int) -> Device:
    lib = ggml.lib()
    name, description = lib.ggml_backend_dev_name(handle), lib.ggml_backend_dev_description(handle)
    kind = DeviceKind(lib.ggml_backend_dev_type(handle))
    return Device(name.decode(), description.decode("utf-8", "replace"), kind, handle)


@lru_cache(maxsize=1)
def _load_backends() -> None:
    # builds with backends as plugins register nothing until they are loaded
    if ggml.lib().ggml_backend_dev_count() == 0:
        ggml.lib().ggml_backend_load_all_from_path(str(ggml.directory()).encode())


@lru_cache(maxsize=16)
def _rpc_device(endpoint: str) -> Device:
    lib = ggml.lib()
    reg = lib.ggml_backend_reg_by_name(b"RPC")
    address = reg and lib.ggml_backend_reg_get_proc_address(reg, b"ggml_backend_rpc_add_server")
    if not address:
        raise BackendError(
            "this build of llama-cpp-python has no RPC backend",
            hint='rebuild it with CMAKE_ARGS="-DGGML_RPC=ON"',
        )
    _answers(endpoint)
    # ggml_backend_reg_t ggml_backend_rpc_add_server(const char * endpoint)
    add_server = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(address)
    server = add_server(endpoint.encode())
    if not server or lib.ggml_backend_reg_dev_count(server) == 0:
        raise BackendError(
            f"no RPC server answers at {endpoint}", hint="start one with rpc-server, or check HOST:PORT"
        )
    lib.ggml_backend_register(server)
    return _device(lib.ggml_backend_reg_dev_get(server, 0))


def _answers(endpoint: str) -> None:
    # ggml aborts the process when it cannot connect
    host, _, port = endpoint.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError, OverflowError) as e:
        raise BackendError(
            f"no RPC server answers at {endpoint!r}: {e}",
            hint="start one with rpc-server, or check HOST:PORT",
        ) from e
