"""The model in the box: where its files are, and what it says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from qvl.runtime.errors import InputError

INTRODUCTION: Final = (
    "qvl's embedded nano model knows drawn shapes, digits, a few words and short clips; it makes mistakes.\n"
    "For photographs, get one of Qwen's models: `qvl models` says how."
)


def path() -> Path:
    """The folder with the text GGUF and its mmproj.

    Raises:
        InputError: this installation came without them.
    """
    folder = Path(__file__).parent / "gguf"
    if not folder.is_dir():
        hint = "name a model with -m: a GGUF file, or a folder with a text GGUF and its mmproj"
        raise InputError(f"no embedded model in this installation: {folder} is missing", hint=hint)
    return folder
