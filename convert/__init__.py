"""Converts checkpoints of Hugging Face to GGUF files.

>>> from qvl.convert import convert
>>> convert("Qwen/Qwen2-VL-2B-Instruct", "models/").text  # doctest: +SKIP
"""

from __future__ import annotations

from qvl.convert.pipeline import convert
from qvl.convert.summary import Converted

__all__ = ["Converted", "convert"]


def __dir__() -> list[str]:
    return sorted(__all__)
