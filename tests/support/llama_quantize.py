"""libllama's own quantizer, the reference for ours."""

from __future__ import annotations

import ctypes
import logging
import re
from pathlib import Path

import llama_cpp
from support.llama_log import silent_llama

from qvl.runtime.ggml.imatrix import read_imatrix
from qvl.runtime.llama.binding import llama


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


def llama_types(source: Path, file_type: int) -> dict[str, str]:
    """Types by tensor name that `llama_model_quantize` would give, as its log says without doing the work.

    Raises:
        RuntimeError: libllama refused.
    """
    c, lines = llama(), _Lines()
    params = c.llama_model_quantize_default_params()
    params.ftype, params.dry_run = file_type, True
    logger = logging.getLogger("qvl.llama")
    level = logger.level
    logger.addHandler(lines)
    logger.setLevel("INFO")
    logger.propagate = False
    try:
        failed = c.llama_model_quantize(str(source).encode(), b"none", ctypes.byref(params))
    finally:
        logger.removeHandler(lines)
        logger.setLevel(level)
        logger.propagate = True
    if failed:
        raise RuntimeError(f"llama_model_quantize returned {failed} for file type {file_type}")
    text = "\n".join(lines.kept)
    return {name: kind.upper() for name, kind in re.findall(r"\] +(\S+) +- \[.*-> .* MiB \((\S+)\)", text)}


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.kept: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.kept.append(record.getMessage())
