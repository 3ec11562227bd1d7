"""Names of files as people and programs write them down, and the files that they mean."""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from glob import has_magic
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from qvl.runtime.errors import InputError
from qvl.runtime.files import is_there

SYSTEM_FOLDERS: Final = frozenset(
    name.casefold()
    for name in (
        *("@eaDir", "#recycle", "#snapshot", "@Recycle", "@Recently-Snapshot", "@tmp"),  # of a NAS
        *("$RECYCLE.BIN", "System Volume Information", "lost+found", "__MACOSX"),
    )
)
"""Folders that a system keeps beside a person's own: thumbnails, deleted files, snapshots."""

_MARKS: Final = (  # UTF-32's first: that of UTF-16 is its beginning
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_QUOTES: Final = ('""', "''", "“”")


def decode_list(data: bytes) -> str:
    """The text of a list in UTF-8 or, as PowerShell's `>` and Windows' Notepad write, UTF-16.

    Bytes that are no UTF-8 become lone surrogates, as Python has them in names.

    Raises:
        UnicodeError: UTF-16 that is damaged.
    """
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return data.decode(encoding, "surrogatepass")
    even, odd = data[::2].count(0), data[1::2].count(0)
    if max(even, odd) > len(data) // 4 and min(even, odd) <= len(data) // 16:  # UTF-16 without a mark
        return data.decode("utf-16-be" if even > odd else "utf-16-le", "surrogatepass")
    return data.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")


def split_list(text: str) -> list[str]:
    """Lines of a list that are not blank: by NUL if there is one, else at line feeds.

    Other separators of Unicode, such as U+2028, may be in a name.
    """
    if "\0" in text:
        return [line for line in text.split("\0") if line.strip()]
    if "\n" not in text:
        text = text.replace("\r", "\n")  # as Macs once ended their lines
    return [line for line in (line.removesuffix("\r") for line in text.split("\n")) if line.strip()]


def meant(line: str, folder: Path | None = None) -> Path:
    """The file that a line of a list means: as it stands, else without quotes, as a URL, by NFC.

    Args:
        folder: of the list: names that are not found from the working folder are looked for there.
    """
    for text in _readings(line):
        for path in (Path(text), folder / text if folder else Path(text)):
            if is_there(path):
                return path
    for text in _readings(line):
        for path in (Path(text), folder / text if folder else Path(text)):
            if (found := normalized(path)) is not None:
                return found
    return Path(line)


def _readings(line: str) -> Iterator[str]:
    yield line
    text = line.strip()
    yield text
    if len(text) > 2 and text[0] + text[-1] in _QUOTES:  # "Copy as path", ls -Q
        yield text[1:-1]
        yield re.sub(r"\\(.)", r"\1", text[1:-1])
    if text.lower().startswith("file://"):
        yield url2pathname(unquote(urlsplit(text).path))


def normalized(path: Path) -> Path | None:
    """The one file whose path differs only in how its accents are composed; None if none, or several.

    Macs decompose the accents of names (NFD), keyboards and tables compose them (NFC).
    """
    if str(path).isascii():
        return None
    found = Path(path.anchor)
    for part in path.parts[1:] if path.anchor else path.parts:
        if not is_there(found / part):
            same = by_composition(part, (p.name for p in _children(found)))
            if same is None:
                return None
            part = same
        found /= part
    return found


def by_composition(name: str, names: Iterable[str]) -> str | None:
    """The one of some names that equals a name in NFC; None if there is none, or several."""
    wanted = unicodedata.normalize("NFC", name)
    same = {other for other in names if unicodedata.normalize("NFC", other) == wanted}
    return same.pop() if len(same) == 1 else None


def matches(pattern: Path) -> list[Path]:
    """Matches of a glob, in order. Parts of it that exist as they stand are names, not patterns.

    Raises:
        InputError: `**` inside a name.
    """
    if any("**" in part and part != "**" for part in pattern.parts):
        raise InputError(
            f"{pattern}: `**` can only be an entire path component",
            hint="`**` stands for whole folders, as in photos/**/*.jpg",
        )
    start = Path(pattern.anchor)
    return sorted(set(_match(start, pattern.parts[1:] if pattern.anchor else pattern.parts)))


def _match(folder: Path, parts: tuple[str, ...]) -> Iterator[Path]:
    if not parts:
        yield folder
        return
    part, rest = parts[0], parts[1:]
    if part == "**":
        yield from _match(folder, rest)
        for child in _children(folder):
            if child.is_dir() and not child.is_symlink() and not _is_systems(child):
                yield from _match(child, parts)
    elif not has_magic(part) or is_there(folder / part):
        if is_there(folder / part):
            yield from _match(folder / part, rest)
    else:
        for child in _children(folder):
            if fnmatch(child.name, part) and not _is_systems(child):
                yield from _match(child, rest)


def _is_systems(path: Path) -> bool:
    return path.name.casefold() in SYSTEM_FOLDERS


def _children(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except (OSError, ValueError):
        return []
