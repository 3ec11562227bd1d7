"""Serve this machine's CPU as an RPC device: python -m support.rpc_server HOST:PORT."""

from __future__ import annotations

import ctypes
import sys

from qvl.runtime.ggml import library as ggml
from qvl.runtime.ggml.devices import cpu_device


def main(endpoint: str) -> None:
    lib = ggml.lib()
    reg = lib.ggml_backend_reg_by_name(b"RPC")
    address = lib.ggml_backend_reg_get_proc_address(reg, b"ggml_backend_rpc_start_server")
    devices = (ctypes.c_void_p * 1)(cpu_device().handle)
    # void ggml_backend_rpc_start_server(const char * endpoint, const char * cache_dir, size_t n_threads,
    #                                    size_t n_devices, ggml_backend_dev_t * devices)
    start = ctypes.CFUNCTYPE(
        None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p
    )(address)
    start(endpoint.encode(), None, 2, 1, ctypes.addressof(devices))


if __name__ == "__main__":
    main(sys.argv[1])
