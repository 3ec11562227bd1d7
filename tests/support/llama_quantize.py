"""libllama's own quantizer, the reference for ours."""

from __future__ import annotations

import ctypes
from pathlib import Path

import llama_cpp
from support.llama_log import silent_llama


def llama_quantize(source: Path, out: Path, file_type: int) -> Path:
    """`llama_model_quantize` of a GGUF file to a file type (`enum llama_ftype`).

    Raises:
        RuntimeError: libllama refused.
    """
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = file_type
    params.nthread = 2
    with silent_llama():
        failed = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params))
    if failed:
        raise RuntimeError(f"llama_model_quantize returned {failed} for file type {file_type}")
    return out
