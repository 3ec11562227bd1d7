"""Which files a model is made of: a text GGUF and its mmproj."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qvl.runtime.errors import InputError
from qvl.runtime.files import expanded

_LATER_SHARD: Final = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")
# what a file name says of its type: NAME-Q4_K_M.gguf, mmproj-NAME-Q8_0.gguf
_TYPE: Final = re.compile(r"[-._](?:I?Q\d\w*|B?F16|F32|\d{5}-of-\d{5})$", re.IGNORECASE)


@dataclass(frozen=True)
class ModelFiles:
    """The two files of a model; without an mmproj it reads text only."""

    text: Path
    mmproj: Path | None


def find_model(path: str | Path | None = None, mmproj: str | Path | None = None) -> ModelFiles:
    """The files that a path stands for.

    Args:
        path: a text GGUF, a folder that holds one and its mmproj, or None for the embedded model.
        mmproj: in place of the one found beside the text file.

    Raises:
        InputError: nothing there, or more than one choice; the message lists them.
    """
    place = embedded_model() if path is None else expanded(path)
    if not place.exists():
        raise InputError(
            f"{place}: no such file or folder", hint="qvl convert makes GGUF files of a checkpoint"
        )
    text = place
    if place.is_dir():
        texts = [p for p in _gguf_files(place) if not _is_mmproj(p)]
        text = _only(texts, f"{place}: model files", "name one of them")
    if mmproj is not None:
        chosen = expanded(mmproj)
        if not chosen.is_file():
            raise InputError(f"{chosen}: no such file", hint="`mmproj` takes the mmproj GGUF of the model")
        return ModelFiles(text, chosen)
    return ModelFiles(text, _mmproj_beside(text))


def embedded_model() -> Path:
    """The model that comes with qvl.

    Raises:
        InputError: this installation has none.
    """
    try:
        embedded = importlib.import_module("qvl.models.embedded")
    except ImportError as e:
        hint = "name a model: a GGUF file or a folder with a text GGUF and its mmproj"
        raise InputError("this installation has no embedded model", hint=hint) from e
    return Path(embedded.path())


def _mmproj_beside(text: Path) -> Path | None:
    found = [p for p in _gguf_files(text.parent) if _is_mmproj(p) and p != text]
    named = [p for p in found if _base(text.stem) in p.stem.lower()]
    candidates = named or found
    if not candidates:
        return None
    return _only(candidates, f"{text}: mmproj files beside it", "choose one with `mmproj`")


def _gguf_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*.gguf") if p.is_file() and not _LATER_SHARD.search(p.name))


def _is_mmproj(path: Path) -> bool:
    return "mmproj" in path.name.lower()


def _base(stem: str) -> str:
    while shorter := _TYPE.sub("", stem):
        if shorter == stem:
            break
        stem = shorter
    return stem.lower()


def _only(paths: Sequence[Path], what: str, advice: str) -> Path:
    if len(paths) == 1:
        return paths[0]
    if not paths:
        raise InputError(f"{what}: none", hint="qvl convert makes GGUF files of a checkpoint")
    names = ", ".join(p.name for p in paths)
    raise InputError(f"{what}: {len(paths)} of them: {names}", hint=advice)
