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
from itertools import islice
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from qvl.runtime.errors import ImageError, InputError, VideoError
from qvl.runtime.files import expanded, is_there
from qvl.runtime.vision.kind import IMAGE_SUFFIXES, VIDEO_SUFFIXES, Kind, kind_of

# A shell splits at space, tab and newline only: Macs put U+202F into the names of screenshots.
# Between single quotes an apostrophe is written '\'' (VTE, kitty) or '"'"' (Python's shlex).
_QUOTED: Final = re.compile(r"""'[^']*'(?:(?:\\'|"'")'[^']*')*|"(?:\\.|[^"\\])*\"""")
# A run in which a backslash keeps the next character
_ESCAPED: Final = re.compile(r"(?:\\.|[^ \t\n\\]|\\$)+", re.S)
_ARGUMENT: Final = re.compile(f"{_QUOTED.pattern}|{_ESCAPED.pattern}", re.S)
_APOSTROPHE: Final = re.compile(r"""'(?:\\'|"'")'""")
# Where a path with unescaped spaces may begin: at a slash, ~, a dot and slash, a drive, or file://
_ROOTED: Final = re.compile(r"(?:file://|~?/|\.{1,2}/|[A-Za-z]:\\)")
_WORD: Final = re.compile(r"(?<![^ \t\n(\[{<«„“])[^ \t\n]")
# The end of a picture's or a video's name, also before the punctuation that a sentence puts after it
_NAMES: Final = "|".join(suffix[1:] for suffix in IMAGE_SUFFIXES | VIDEO_SUFFIXES)
_SUFFIX: Final = re.compile(
    rf"""\.(?:{_NAMES})(?=[ \t\n.,;:!?)\]}}>»”'"]|$)""",
    re.I,
)
_LONGEST: Final = 4096  # characters of a path
_MOST_ENDS: Final = 32  # of names that a path with spaces could have; each is looked up
# Words that name a picture or a video even where there is no such file
_NAMED: Final = re.compile(
    r"""(?<![^ \t\n'"(\[{<«„“])[^ \t\n'"(\[{<«„“]+"""
    r"""\.(?:png|jpe?g|webp|gif|bmp|tiff?|hei[cf]|avif|jxl|mp4|mov|m4v|mkv|webm|avi)\b""",
    re.I,
)
DOWNLOAD: Final = "download it first (curl -LO ADDRESS), then name the file"
_SPACES: Final = re.compile(r"[^\S\n]")


@dataclass(frozen=True)
class Attachment:
    """A picture or a video that goes into the next message.

    Attributes:
        options: bounds and sampling, by the names of the message part: ("fps", 1.0).
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
    if is_address(str(path)):
        name = str(path).replace(":/", "://", 1) if "://" not in str(path) else str(path)
        raise error(f"{name}: a web address; qvl does not download", hint=DOWNLOAD)
    try:
        path.stat()
    except FileNotFoundError as e:
        if (other := _spaced(path)) is not None:
            return Attachment(other.resolve(), kind)
        if path.is_symlink():
            raise error(f"{path}: a link to {path.readlink()}, which is not there") from e
        hint = None if path.is_absolute() else f"looked for it in {Path.cwd()}"
        raise error(f"{path}: no such file", hint=hint) from e
    except (OSError, ValueError) as e:
        raise error(f"{path}: cannot be read: {getattr(e, 'strerror', None) or e}") from e
    if path.is_dir() and kind == "image":
        hint = "a folder of frames is a video: --video FOLDER, in a conversation /video FOLDER"
        raise error(f"{path}: a folder, not a picture", hint=hint)
    return Attachment(path.resolve(), kind)


def _spaced(path: Path) -> Path | None:
    """The one file whose name differs only in the kind of its spaces; None if there is none, or several."""
    name = _SPACES.sub(" ", path.name)
    if " " not in name:
        return None
    try:
        found = [p for p in path.parent.iterdir() if _SPACES.sub(" ", p.name) == name]
    except OSError:
        return None
    return found[0] if len(found) == 1 else None


def is_address(text: str) -> bool:
    """True if a text is a web address."""
    return re.match(r"https?:/", text) is not None


def extract(message: str) -> tuple[str, list[Attachment]]:
    """Take the pictures and videos out of a message that mentions them by path.

    A path counts if it names an existing file with the suffix of a picture or a video; it may be quoted or
    escaped as shells, terminals and our completion write it. The rest of the message is returned with the
    paths cut out; ordinary words are never touched.
    """
    found: list[Attachment] = []
    kept, last = [], 0
    ends = [match.end() for match in _SUFFIX.finditer(message)]
    for match in _WORD.finditer(message, 0, ends[-1] if ends else 0):
        start = match.start()
        if start >= last and (hit := _mention(message, start)):
            end, path, kind = hit
            found.append(Attachment(path.resolve(), kind))
            kept.append(message[last:start])
            last = end
    if not found:
        return message, []
    kept.append(message[last:])
    return re.sub(r"[ \t]{2,}", " ", "".join(kept)).strip(), found


def _mention(message: str, start: int) -> tuple[int, Path, Kind] | None:
    """End, file and kind of the path that begins here; None if none does."""
    for text in _readings(message, start):
        path = Path(clean_path(text))
        if not _is_file(path):
            other = _spaced(path) if kind_of(path) else None
            path = other or path
        if (kind := kind_of(path)) and _is_file(path):
            return start + len(text), path, kind
    return None


def _readings(message: str, start: int) -> Iterator[str]:
    """Candidates for the path that begins here, the longest first where it has unescaped spaces."""
    if quoted := _QUOTED.match(message, start):
        yield quoted[0]
    if _ROOTED.match(message, start):
        line = message.find("\n", start)
        end = min(start + _LONGEST, len(message) if line < 0 else line)
    elif escaped := _ESCAPED.match(message, start):
        end = escaped.end()
    else:
        return
    ends = [found.end() for found in islice(_SUFFIX.finditer(message, start, end), _MOST_ENDS)]
    yield from (message[start:end] for end in reversed(ends))


def unmet(message: str, names: Collection[str]) -> list[str]:
    """Words that read like pictures or videos, where there is no such file and none of these names.

    >>> unmet("What differs between a.png and b.png?", ["a.png"])
    ['b.png']
    """
    known = {name.lower() for name in names}
    found = (match[0] for match in _NAMED.finditer(message))
    return [word for word in found if Path(word).name.lower() not in known and not _ends_a_name(word, known)]


def _ends_a_name(word: str, names: Collection[str]) -> bool:
    """True if the word is the end of a name with spaces: "star.png" of "my red star.png"."""
    return any(name.endswith(f" {Path(word).name.lower()}") for name in names)


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
    """True if a line that begins with "/" begins with a path rather than with a command."""
    word = line.split(maxsplit=1)[0]
    return "/" in word[1:] or kind_of(Path(word)) is not None or is_there(Path(clean_path(word)))
