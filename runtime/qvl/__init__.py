"""Qwen's vision models on a laptop: `qvl.runtime` runs them, `qvl.convert` makes their GGUF files.

>>> import qvl
>>> with qvl.runtime.load() as model:  # doctest: +SKIP
...     print(model.ask("photo.jpg", "What is this?").text)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str

_PACKAGES = ("cli", "convert", "models", "runtime")
__all__ = ["__version__", "convert", "models", "runtime"]


def __getattr__(name: str) -> Any:
    # the commands start faster where nothing is imported before it is needed
    if name == "__version__":
        from importlib.metadata import version

        return version("qvl")
    if name in _PACKAGES:
        return importlib.import_module(f"qvl.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
