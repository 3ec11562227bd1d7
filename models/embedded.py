"""The model in the box: where its files are, and what it says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Final

INTRODUCTION: Final = (
    "qvl's embedded nano model: it knows drawn shapes, their colours, places and numbers, digits and short\n"
    "words. For photographs, get Qwen2-VL itself: `qvl models` says how."
)


def path() -> Path:
    """The folder with the text GGUF and its mmproj."""
    return Path(__file__).parent / "gguf"
