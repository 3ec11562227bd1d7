"""Models on this machine: those that were used before, and those in the working folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qvl.runtime.errors import QvlError
from qvl.runtime.files import expanded, state_dir

_KEPT: Final = 50


@dataclass(frozen=True)
class Local:
    """A model that is here.

    Attributes:
        n_bytes: of both files.
        is_default: used where no model is named.
    """

    text: Path
    mmproj: Path | None
    n_bytes: int
    is_default: bool


def remember(text: Path) -> None:
    """Keep the text file's place for `local_models`; where nothing can be kept, nothing is."""
    from qvl.runtime.atomic import PRIVATE, write_whole

    path = text.resolve()
    kept = [path, *(p for p in _remembered() if p != path)][:_KEPT]
    if kept == _remembered():
        return
    try:
        _list().parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(_list(), "".join(f"{os.fspath(p)}\n" for p in kept), mode=PRIVATE)
    except (OSError, ValueError):
        return


def local_models() -> list[Local]:
    """List the models that can be loaded here, the default first."""
    from qvl.runtime.find import default_model, find_model

    try:
        default = find_model(default_model()).text.resolve()
    except QvlError:
        default = None
    found: dict[Path, Local] = {}
    for path in _candidates(default):
        try:
            files = find_model(path)
            sizes = [p.stat().st_size for p in (files.text, files.mmproj) if p is not None]
        except (QvlError, OSError):  # gone since, or several mmproj files: -m says what is wrong
            continue
        text = files.text.resolve()
        found[text] = Local(text, files.mmproj, sum(sizes), text == default)
    return list(found.values())


def _candidates(default: Path | None) -> Iterator[Path]:
    if default is not None:
        yield default
    yield from _remembered()
    for folder in (Path(), Path("models")):
        yield from (p for p in sorted(folder.glob("*.gguf")) if "mmproj" not in p.name.lower())


def _remembered() -> list[Path]:
    try:
        lines = _list().read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    return [expanded(line) for line in lines if line]


def _list() -> Path:
    return state_dir() / "models"
