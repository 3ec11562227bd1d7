"""Runs Qwen vision-language models: pictures and a prompt in, a reply out.

>>> from qvl.runtime import load
>>> with load("Qwen2-VL-2B-Q4_K_M.gguf") as model:  # doctest: +SKIP
...     print(model.ask("a.jpg", "What is this?").text)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qvl.runtime.caption.api import caption
    from qvl.runtime.caption.record import Record
    from qvl.runtime.engine.reply import Reply
    from qvl.runtime.engine.session import Session
    from qvl.runtime.errors import InputError, QvlError
    from qvl.runtime.model import Model, load
    from qvl.runtime.vision.encoder import VisionEmbedding

__all__ = [
    "InputError",
    "Model",
    "QvlError",
    "Record",
    "Reply",
    "Session",
    "VisionEmbedding",
    "caption",
    "load",
]

_MODULES = {
    "InputError": "errors",
    "Model": "model",
    "QvlError": "errors",
    "Record": "caption.record",
    "Reply": "engine.reply",
    "Session": "engine.session",
    "VisionEmbedding": "vision.encoder",
    "load": "model",
}


def __getattr__(name: str) -> Any:
    # numpy, Pillow and llama.cpp are loaded when a model is, not when somebody asks for --help
    if name == "caption":  # a package that can be called
        return importlib.import_module("qvl.runtime.caption")
    if name in _MODULES:
        return getattr(importlib.import_module(f"qvl.runtime.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
