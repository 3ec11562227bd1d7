"""Runs Qwen's vision models from their GGUF files.

>>> from qvl.runtime import draw, load
>>> with load("Qwen2-VL-2B-Q4_K_M.gguf") as model:  # doctest: +SKIP
...     print(model.ask("photo.jpg", "What is this?").text)
...     reply = model.ask("photo.jpg", "Find the cat.")
...     draw("photo.jpg", reply.boxes).save("cat.png")

Errors derive from `QvlError`; `qvl.runtime.errors` has them all.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qvl.runtime.caption.api import caption
    from qvl.runtime.caption.record import Record
    from qvl.runtime.engine.reply import Piece, Reply, Stream
    from qvl.runtime.engine.session import Session
    from qvl.runtime.errors import InputError, QvlError
    from qvl.runtime.grounding.draw import draw
    from qvl.runtime.model import Model, load
    from qvl.runtime.vision.encoder import VisionEmbedding

__all__ = [
    "InputError",
    "Model",
    "Piece",
    "QvlError",
    "Record",
    "Reply",
    "Session",
    "Stream",
    "VisionEmbedding",
    "caption",
    "draw",
    "load",
]

_MODULES = {
    "InputError": "errors",
    "Model": "model",
    "Piece": "engine.reply",
    "QvlError": "errors",
    "Record": "caption.record",
    "Reply": "engine.reply",
    "Session": "engine.session",
    "Stream": "engine.reply",
    "VisionEmbedding": "vision.encoder",
    "draw": "grounding.draw",
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
