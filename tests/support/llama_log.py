"""llama.cpp's log, silenced for a while."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import llama_cpp


@contextmanager
def silent_llama() -> Iterator[Any]:
    """Drop what llama.cpp logs; afterwards the log goes where it went before.

    Yields:
        the callback that drops it, which the C side holds a pointer to.
    """
    before, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(before), ctypes.byref(data))
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    try:
        yield silent
    finally:
        llama_cpp.llama_log_set(before, data)
