"""Run Qwen2-VL: see a picture, read a prompt, reply.

>>> from qvl.runtime import load
>>> with load("Qwen2-VL-2B-Q4_K_M.gguf") as model:  # doctest: +SKIP
...     message = {"role": "user", "content": [{"type": "image", "image": "a.jpg"}, "What is this?"]}
...     print(model.generate([message]).result().text)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qvl.runtime.caption.api import caption
    from qvl.runtime.model import Model, load

__all__ = ["Model", "caption", "load"]


def __getattr__(name: str) -> Any:
    # numpy, Pillow and llama.cpp are loaded when a model is, not when somebody asks for --help
    if name == "caption":  # a package that can be called
        return importlib.import_module("qvl.runtime.caption")
    if name in __all__:
        from qvl.runtime import model

        return getattr(model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
