"""Finds the files of a model: a text GGUF and its mmproj."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qvl.runtime.errors import InputError, shown
from qvl.runtime.files import expanded
from qvl.runtime.ggml.skim import file_kind
from qvl.runtime.resources import free_memory

_LATER_SHARD: Final = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")
# what a file name says of its type: NAME-Q4_K_M.gguf, mmproj-NAME-Q8_0.gguf
EMBEDDED: Final = "embedded"
VARIABLE: Final = "QVL_MODEL"
_TYPE: Final = re.compile(r"[-._](?:I?Q\d\w*|B?F16|F32|\d{5}-of-\d{5})$", re.IGNORECASE)


@dataclass(frozen=True)
class ModelFiles:
    """The two files of a model; without an mmproj it reads text only."""

    text: Path
    mmproj: Path | None


def find_model(path: str | Path | None = None, mmproj: str | Path | None = None) -> ModelFiles:
    """The files that a path stands for.

    Args:
        path: a text GGUF; a folder that holds one and its mmproj; `FOLDER:TYPE` for one of several types in
            it, of which else the best is taken that fits the free memory; "embedded"; or None for what the
            environment variable QVL_MODEL names, and the embedded model without it.
        mmproj: in place of the one found beside the text file.

    Raises:
        InputError: nothing there, or more than one model; the message lists them.
    """
    for name, given in (("path", path), ("mmproj", mmproj)):
        if not (given is None or (isinstance(given, str | os.PathLike) and "\0" not in str(given))):
            raise InputError(f"{name} is {shown(given)}, expected a path")
    chosen = default_model() if path is None else path
    place, kind = _parted(chosen)
    if not place.exists():
        if str(chosen) == EMBEDDED:
            return find_model(embedded_model(), mmproj)
        where = f"{VARIABLE}={chosen}" if path is None else place
        raise InputError(
            f"{where}: no such file or folder", hint="qvl convert makes GGUF files of a checkpoint"
        )
    text = place
    if place.is_dir():
        texts = [p for p in _gguf_files(place) if _is_text(p)]
        text = _of_type(texts, place, kind) if kind else _one(texts, place, "model", "name one")
    if mmproj is not None:
        given = expanded(mmproj)
        if not given.is_file():
            raise InputError(f"{given}: no such file", hint="`mmproj` takes the mmproj GGUF of the model")
        return ModelFiles(text, given)
    return ModelFiles(text, _mmproj_beside(text))


def default_model() -> str | Path:
    """The model that QVL_MODEL names, else the embedded one."""
    return os.environ.get(VARIABLE) or embedded_model()


def _parted(path: str | Path) -> tuple[Path, str]:
    """A folder and the type after a colon: "models:q8_0"."""
    place = expanded(path)
    folder, colon, kind = str(path).rpartition(":")
    if colon and not place.exists() and expanded(folder).is_dir():
        return expanded(folder), kind
    return place, ""


def _of_type(texts: Sequence[Path], folder: Path, kind: str) -> Path:
    found = [p for p in texts if re.search(rf"[-._]{re.escape(kind)}(?=[-.])", p.name, re.IGNORECASE)]
    if not found:
        names = ", ".join(p.name for p in texts) or "none"
        raise InputError(f"{folder}: no model file of type {kind}, found {names}")
    return _only(found, folder, f"model of type {kind}", "name one of them")


def _one(paths: Sequence[Path], place: Path, what: str, advice: str) -> Path:
    """The only path, or of several types of one model the largest that fits the free memory."""
    if len(paths) > 1 and len({_base(p.stem) for p in paths}) == 1:
        by_size = sorted(paths, key=lambda p: p.stat().st_size)
        room = free_memory()
        return next((p for p in reversed(by_size) if p.stat().st_size <= room), by_size[0])
    return _only(paths, place, what, f"{advice} of them")


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
    return _one(candidates, text.parent, "mmproj", "choose with `mmproj` one")


def _gguf_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*.gguf") if p.is_file() and not _LATER_SHARD.search(p.name))


def _is_mmproj(path: Path) -> bool:
    """True if a file is an image encoder by its metadata, or without any by its name."""
    kind = file_kind(path)
    if kind is None or not kind.architecture:
        return "mmproj" in path.name.lower() and kind is None
    return kind.architecture == "clip"


def _is_text(path: Path) -> bool:
    """True if a file may be a decoder: no image encoder, importance matrix, adapter or vocabulary."""
    kind = file_kind(path)
    if kind is None:  # damaged, or no GGUF file at all: to be named by what opens it
        return not _is_mmproj(path)
    return kind.architecture not in ("", "clip") and kind.type in ("", "model")


def _base(stem: str) -> str:
    while shorter := _TYPE.sub("", stem):
        if shorter == stem:
            break
        stem = shorter
    return stem.lower()


def _only(paths: Sequence[Path], place: Path, what: str, advice: str) -> Path:
    if len(paths) == 1:
        return paths[0]
    if not paths:
        raise InputError(
            f"{place}: no .gguf {what} here", hint="qvl convert makes GGUF files of a checkpoint"
        )
    names = ", ".join(p.name for p in paths)
    raise InputError(f"{place}: {len(paths)} .gguf {what} files: {names}", hint=advice)
