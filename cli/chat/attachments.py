"""Paths as people give them: typed, quoted, escaped, or dropped onto the terminal.

>>> split_paths("'my photo.jpg' b\\\\ c.png file:///tmp/d%20e.webp")
['my photo.jpg', 'b c.png', '/tmp/d e.webp']
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from qvl.runtime.errors import ImageError, InputError, VideoError
from qvl.runtime.files import expanded, is_there
from qvl.runtime.vision.kind import Kind, kind_of

# One argument: a quoted string, or a run in which a backslash keeps the next character. Between single quotes
# an apostrophe is written '\'' (VTE, kitty) or '"'"' (Python's shlex).
_ARGUMENT: Final = re.compile(r"""'[^']*'(?:(?:\\'|"'")'[^']*')*|"(?:\\.|[^"\\])*"|(?:\\.|[^\s\\])+""")
_APOSTROPHE: Final = re.compile(r"""'(?:\\'|"'")'""")
# Where in a message a path may begin: at a quote, a slash, ~, a dot and slash, or file://
_ROOTED: Final = re.compile(r"""(?<!\S)(?=['"]?(?:file://|~?/|\.{1,2}/))""")
_BARE_WORD: Final = re.compile(r"""(?<!\S)['"]?[^\s'"]+\.[A-Za-z0-9]{2,4}\b['"]?""")
_CLOSING: Final = ".,;:!?)]}»”"


@dataclass(frozen=True)
class Attachment:
    """A picture or a video that goes into the next message.

    Attributes:
        options: how to look at it, by the names of the message part: ("fps", 1.0).
    """

    path: Path
    kind: Kind
    options: tuple[tuple[str, float], ...] = ()

    def part(self) -> dict[str, Any]:
        """The message part, in the shape of OpenAI and HF: {"type": "image", "image": path}."""
        return {"type": self.kind, self.kind: str(self.path), **dict(self.options)}

    @classmethod
    def of_part(cls, part: Mapping[str, Any]) -> Attachment:
        """The reverse of `part`."""
        kind = part["type"]
        options = tuple((k, v) for k, v in part.items() if k not in ("type", kind))
        return cls(Path(part[kind]), kind, options)


def shown(path: Path) -> str:
    """A path as a person would write it here: from the working folder or from home."""
    for base, lead in ((Path.cwd(), ""), (expanded("~"), "~/")):
        if path.is_relative_to(base):
            return f"{lead}{path.relative_to(base)}"
    return str(path)


def split_paths(text: str) -> list[str]:
    """The arguments of `/image`, as a shell would split them; file:// and ~ are resolved."""
    return [clean_path(match[0]) for match in _ARGUMENT.finditer(text)]


def clean_path(text: str) -> str:
    """One path without its quotes, backslashes, `file://` and `~`."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        quote, text = text[0], text[1:-1]
        text = _APOSTROPHE.sub("'", text) if quote == "'" else re.sub(r'\\(["\\$`])', r"\1", text)
    elif os.sep != "\\":
        text = re.sub(r"\\(.)", r"\1", text)
    if text.startswith("file://"):
        text = unquote(urlsplit(text).path)
    return str(expanded(text)) if text.startswith("~") else text


def attach(paths: list[str], kind: Kind) -> list[Attachment]:
    """Attachments of paths that must exist, or of patterns (`*.png`) that some match.

    Raises:
        InputError: nothing given. ImageError, VideoError: no such file, or a folder where none can be.
    """
    if not paths:
        raise InputError(f"no {kind} given", hint=f"/{kind} PATH; quotes are needed only around spaces")
    return [_existing(Path(found), kind) for path in paths for found in _matches(path)]


def _matches(path: str) -> list[str]:
    """The path itself, or what a pattern stands for."""
    if is_there(Path(path)) or not has_magic(path):
        return [path]
    return sorted(glob(path)) or [path]  # noqa: PTH207 - absolute and relative patterns alike


def _existing(path: Path, kind: Kind) -> Attachment:
    error = ImageError if kind == "image" else VideoError
    try:
        path.stat()
    except FileNotFoundError as e:
        if path.is_symlink():
            raise error(f"{path}: a link to {path.readlink()}, which is not there") from e
        hint = None if path.is_absolute() else f"it was looked for in {Path.cwd()}"
        raise error(f"{path}: no such file", hint=hint) from e
    except (OSError, ValueError) as e:
        raise error(f"{path}: cannot be read: {getattr(e, 'strerror', None) or e}") from e
    if path.is_dir() and kind == "image":
        hint = "a folder of frames is a video: --video FOLDER, in a conversation /video FOLDER"
        raise error(f"{path}: a folder, not a picture", hint=hint)
    return Attachment(path.resolve(), kind)


def extract(message: str) -> tuple[str, list[Attachment]]:
    """Take the pictures and videos out of a message that mentions them by path.

    A path counts if it names an existing file with the suffix of a picture or a video. The rest of the
    message is returned with the paths cut out; ordinary words are never touched.
    """
    found: list[Attachment] = []
    spans: list[tuple[int, int]] = []
    for start, end, path in _mentions(message):
        kind = kind_of(path)
        if kind and not any(a <= start < b for a, b in spans):
            found.append(Attachment(path.resolve(), kind))
            spans.append((start, end))
    if not found:
        return message, []
    kept, last = [], 0
    for start, end in sorted(spans):
        kept.append(message[last:start])
        last = end
    kept.append(message[last:])
    rest = re.sub(r"[ \t]{2,}", " ", "".join(kept)).strip()
    order = sorted(range(len(found)), key=lambda i: spans[i])
    return rest, [found[i] for i in order]


def unmet(message: str, names: Collection[str]) -> list[str]:
    """Words that read like pictures or videos, where there is no such file and none of these names.

    >>> unmet("What differs between a.png and b.png?", ["a.png"])
    ['b.png']
    """
    found = (clean_path(match[0]) for match in _BARE_WORD.finditer(message))
    return [word for word in found if kind_of(Path(word)) and Path(word).name not in names]


def _mentions(message: str) -> Iterator[tuple[int, int, Path]]:
    """(start, end, path) of every existing file that the message names, longest reading first."""
    for match in _ROOTED.finditer(message):
        if hit := _longest_file(message, match.start()):
            yield match.start(), *hit
    for match in _BARE_WORD.finditer(message):
        path = Path(clean_path(match[0]))
        if kind_of(path) and _is_file(path):
            yield match.start(), match.end(), path


def _longest_file(message: str, start: int) -> tuple[int, Path] | None:
    """The longest stretch from start that is an existing file: paths are pasted with bare spaces too."""
    line_end = message.find("\n", start)
    line = message[start : line_end if line_end >= 0 else len(message)]
    quoted = _ARGUMENT.match(line) if line[0] in "'\"" else None
    stops = [quoted.end()] if quoted else [m.start() for m in re.finditer(r"\s|$", line)]
    for stop in reversed(stops):
        piece = line[:stop]
        for candidate in dict.fromkeys((piece, piece.rstrip(_CLOSING))):
            path = Path(clean_path(candidate))
            if _is_file(path):
                return start + len(candidate), path
    return None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long, or with a null byte: no file
        return False


def lone_path(line: str) -> Path | None:
    """The file or folder that a line names and says nothing else, as when one is dropped; None for a text."""
    if not re.match(r"""['"]?(?:file://|~?/|\.{1,2}/)""", line):
        return None
    path = Path(clean_path(line))
    return path if is_there(path) else None


def looks_like_path(line: str) -> bool:
    """Whether a line that begins with "/" begins with a path rather than with a command."""
    word = line.split(maxsplit=1)[0]
    return "/" in word[1:] or kind_of(Path(word)) is not None or is_there(Path(clean_path(word)))
