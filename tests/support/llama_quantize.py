"""libllama's own quantizer, the reference for ours."""

from __future__ import annotations

import ctypes
from pathlib import Path

import llama_cpp
from support.llama_log import silent_llama

from qvl.runtime.ggml.imatrix import read_imatrix


def llama_quantize(source: Path, out: Path, file_type: int, imatrix: Path | None = None) -> Path:
    """`llama_model_quantize` of a GGUF file to a file type (`enum llama_ftype`).

    Args:
        imatrix: importance matrix whose mean squares are handed over as llama-quantize does.

    Raises:
        RuntimeError: libllama refused.
    """
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = file_type
    params.nthread = 2
    held = {} if imatrix is None else read_imatrix(imatrix).importance()
    array = (llama_cpp.llama_model_imatrix_data * (len(held) + 1))()  # ends with an entry of zeros
    for item, (key, values) in zip(array, held.items(), strict=False):
        item.name = key.encode()
        item.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        item.size = values.size
    if held:
        params.imatrix = array
    with silent_llama():
        failed = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params))
    if failed:
        raise RuntimeError(f"llama_model_quantize returned {failed} for file type {file_type}")
    return out
