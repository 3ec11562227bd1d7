"""Pictures and videos to caption: files, folders, globs, `@list.txt`, and `-` for stdin.

Folders are searched to any depth in order of name; hidden files and folders, and those that a system keeps
(`@eaDir`, `#recycle`), are left out. A file that is named is always taken, whatever its suffix, and reported
if it is missing; a file in a folder is taken if its suffix is that of a picture or a video. In lists, lines
that begin with `#` are comments: `./#a.png` names such a file.
"""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from qvl.runtime.caption.names import (
    SYSTEM_FOLDERS,
    decode_list,
    matches,
    meant,
    normalized,
    split_list,
)
from qvl.runtime.errors import InputError
from qvl.runtime.files import expanded, is_there
from qvl.runtime.vision.kind import Kind, kind_of

STDIN: Final = "-"


@dataclass(frozen=True, slots=True)
class Item:
    """One picture or video to caption.

    Attributes:
        path: as it was given or found, without `./` and `//`; the key of its record.
        root: the folder that was named and in which it lies; mirrored output keeps the path below it.
    """

    path: str
    root: str = ""

    @property
    def kind(self) -> Kind:
        return kind_of(Path(self.path)) or "image"

    @property
    def below_root(self) -> Path:
        """The path relative to the root, for mirrored output; never one that leads out of it."""
        path = Path(self.path)
        if not (self.root and path.is_relative_to(self.root)):
            return Path(path.name)
        below = Path(os.path.normpath(path.relative_to(self.root)))
        return Path(path.name) if ".." in below.parts else below


@dataclass
class Inputs:
    """The pictures found, in the order in which they will be captioned, each path once.

    Attributes:
        notes: for the user: folders without pictures, globs without matches, files taken for comments.
    """

    items: list[Item] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_inputs(arguments: Iterable[str], stdin: Iterable[str] | None = None) -> Inputs:
    """Expand the arguments of `qvl caption`.

    Args:
        arguments: files, folders, globs, `@FILE` with one of these a line (or NUL-separated), `-`.
        stdin: lines for `-`; by default the process's own.

    Raises:
        InputError: nothing to caption, or a list that cannot be read.
    """
    found = Inputs()
    seen: set[str] = set()
    for argument in arguments:
        for item in _expand(argument, found.notes, stdin):
            if item.path not in seen:
                seen.add(item.path)
                found.items.append(item)
    if not found.items:
        raise InputError(
            "; ".join(found.notes) or "no pictures given",
            hint="name files, folders, globs in quotes, @list.txt, or - to read paths from stdin",
        )
    return found


def _expand(argument: str, notes: list[str], stdin: Iterable[str] | None) -> Iterator[Item]:
    if argument == STDIN:
        for line in _lines(_read_stdin() if stdin is None else "".join(stdin), notes):
            yield from _named(meant(line), notes)
    elif argument.startswith("@") and not is_there(Path(argument)):
        source = expanded(argument[1:])
        for line in _lines(_read_list(source), notes):
            # As other programs read such lists, from the working folder; else from where the list lies.
            yield from _named(meant(line, source.parent), notes)
    else:
        path = Path(argument)
        yield from _named(path if is_there(path) else normalized(path) or path, notes)


def _lines(text: str, notes: list[str]) -> Iterator[str]:
    """The lines of a list; those that begin with `#` are comments, unless NUL separates the names."""
    for line in split_list(text):
        if not line.startswith("#") or "\0" in text:
            yield line
        elif is_there(Path(line)):
            notes.append(f"{line}: taken for a comment; ./{line} names the file")


def _read_stdin() -> str:
    try:
        buffer = getattr(sys.stdin, "buffer", None)
        return sys.stdin.read() if buffer is None else decode_list(buffer.read())
    except UnicodeError as e:
        raise InputError(f"stdin: the list cannot be read: {e}") from e


def _read_list(path: Path) -> str:
    hint = "@FILE reads paths from FILE, one a line"
    if kind_of(path):
        raise InputError(f"{path}: by its name not a list, but a picture or video", hint=hint)
    try:
        return decode_list(path.read_bytes())
    except OSError as e:
        raise InputError(f"{path}: the list cannot be read: {e.strerror}", hint=hint) from e
    except UnicodeError as e:
        raise InputError(f"{path}: UTF-16 that is damaged: {e}", hint="save the list in UTF-8") from e


def _named(path: Path, notes: list[str]) -> Iterator[Item]:
    """A file, a folder or a glob that the user named."""
    if str(path).startswith("~") and not is_there(path):
        path = expanded(path)
    if _is_folder(path):
        found = False
        for file in _walk(path, notes, {path.resolve()}):
            found = True
            yield Item(str(file), str(path))
        if not found:
            notes.append(f"{path}: no pictures in this folder")
    elif is_there(path) or not glob.has_magic(str(path)):
        yield Item(str(path), str(path.parent))  # if it is missing, its record will say so
    else:
        yield from _matches(path, notes)


def _matches(pattern: Path, notes: list[str]) -> Iterator[Item]:
    """Matches of a glob, in order; `**` stands for folders of any depth."""
    parts = pattern.parts
    fixed = next(
        i for i, part in enumerate(parts) if glob.has_magic(part) and not is_there(Path(*parts[: i + 1]))
    )
    root = Path(*parts[:fixed])
    rest = pattern.parts[fixed:]
    wants_hidden = any(part.startswith(".") for part in rest)
    found = False
    for path in matches(pattern):
        if not wants_hidden and any(part.startswith(".") for part in path.relative_to(root).parts):
            continue
        files = _walk(path, notes, {path.resolve()}) if _is_folder(path) else [path] if kind_of(path) else []
        for file in files:
            found = True
            yield Item(str(file), str(root))
    if not found:
        notes.append(f"{pattern}: matches no picture")


def _walk(folder: Path, notes: list[str], seen: set[Path]) -> Iterator[Path]:
    """Files below a folder in order of name; links to folders are followed, each folder once."""
    try:
        children = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
        systems = [path for path in children if path.name.casefold() in SYSTEM_FOLDERS and _is_folder(path)]
    except OSError as e:
        notes.append(f"{folder}: cannot be searched: {e.strerror}")
        return
    if systems:
        names = ", ".join(path.name for path in systems)
        notes.append(f"{folder}: skipped files of the system: {names}")
    for path in children:
        if path in systems:
            continue
        if not _is_folder(path):
            if kind_of(path):
                yield path
        elif (real := path.resolve()) not in seen:
            seen.add(real)
            yield from _walk(path, notes, seen)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # it may not even be looked at: reading it will say so
        return False
