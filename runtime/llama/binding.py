"""The bindings of llama.h, imported when first needed, with llama.cpp's log sent to Python's logging.

`import llama_cpp` takes 0.16 s, of which 0.04 s are the bindings themselves (`llama_cpp.llama_cpp`); the
rest is the package's high-level API and chat formats (jinja2, diskcache), which qvl does not use, and a log
callback of its own. So the package's `__init__` is stepped over. A program that imports llama_cpp itself,
before or after, gets the whole package.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib
import importlib.util
import logging
import sys
import threading
from collections import deque
from types import ModuleType
from typing import Any, Final

from qvl.runtime.errors import BackendError
from qvl.runtime.ggml import library as ggml
from qvl.runtime.interrupt import CallbackGuard

LOGGER: Final = logging.getLogger("qvl.llama")
# ggml.h, enum ggml_log_level; 5 continues the line before it
_LEVELS: Final = {1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}
_CONTINUED: Final = 5

_lock = threading.Lock()
_module: Any = None
_complaints: deque[str] = deque(maxlen=8)
log_guard: Final = CallbackGuard()
"""Keeps what a logging handler raises; checked after the calls that log."""
_keep: list[Any] = []  # the C side holds a pointer to the callback


def llama() -> Any:
    """The module `llama_cpp.llama_cpp`, with llama.cpp's backends initialized and its log routed.

    Raises:
        BackendError: llama-cpp-python is missing or its shared library cannot be loaded.
    """
    global _module
    with _lock:
        if _module is None:
            ggml.lib()  # before llama.cpp would load it
            module = import_part("llama_cpp")
            _route_log(module)
            module.llama_backend_init()
            _module = module
        # others may have set a callback of theirs since, as an import of llama_cpp does
        _module.llama_log_set(_keep[0], ctypes.c_void_p(0))
    return _module


def complaints() -> str:
    """The warnings and errors that llama.cpp has logged since the last call, in one line."""
    lines = [line.strip() for line in _complaints]
    _complaints.clear()
    return "; ".join(line for line in lines if line)


def import_part(name: str) -> ModuleType:
    """The module `llama_cpp.NAME` without the rest of its package.

    Raises:
        BackendError: llama-cpp-python is missing or its shared library cannot be loaded.
    """
    spec = importlib.util.find_spec("llama_cpp") if "llama_cpp" not in sys.modules else None
    try:
        if spec is None or spec.submodule_search_locations is None:
            return importlib.import_module(f"llama_cpp.{name}")
        bare = ModuleType("llama_cpp")
        bare.__path__ = list(spec.submodule_search_locations)
        sys.modules["llama_cpp"] = bare
        try:
            return importlib.import_module(f"llama_cpp.{name}")
        finally:
            # a copy, since other threads import at the same time
            for loaded in list(sys.modules):
                if loaded.partition(".")[0] == "llama_cpp":
                    sys.modules.pop(loaded, None)
    except (ImportError, OSError, RuntimeError) as e:
        raise BackendError(
            f"llama-cpp-python cannot be loaded: {e}", hint=f"pip install llama-cpp-python=={ggml.PINNED}"
        ) from e


def _route_log(module: Any) -> None:
    logging.getLogger("qvl").addHandler(logging.NullHandler())
    line: list[str] = []
    level = logging.INFO

    def log(kind: int, text: bytes, _: Any) -> None:
        nonlocal level
        if kind != _CONTINUED:
            level = _LEVELS.get(kind, logging.DEBUG)
        line.append(text.decode("utf-8", "replace"))
        if not line[-1].endswith("\n"):
            return
        message = "".join(line).rstrip()
        line.clear()
        if level >= logging.WARNING:
            _complaints.append(message)
        LOGGER.log(level, "%s", message)

    callback = module.llama_log_callback(log_guard.wrap(log, lambda kind, text, _: None))
    _keep.append(callback)
    atexit.register(_silence, module)


def _silence(module: Any) -> None:
    # Backends log while they are torn down, after Python is gone: a C function that takes nothing and
    # does nothing stands in for the callback then.
    nothing = ctypes.cast(module._lib.llama_time_us, module.llama_log_callback)
    _keep.append(nothing)
    module.llama_log_set(nothing, ctypes.c_void_p(0))
