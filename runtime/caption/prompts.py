"""The prompt of each picture: one for all, a template, or a file beside it.

A template is text with `{name}`, `{stem}`, `{dir}`, `{width}`, `{height}` and the columns of a CSV file;
`{image}` says where the picture stands in the prompt (first, unless it is said). `{{name}}` stands for
itself with one brace; braces around anything that is no bare word, as in JSON, stay as they are.
"""

from __future__ import annotations

import csv
import errno
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from qvl.runtime.caption.names import by_composition
from qvl.runtime.errors import InputError
from qvl.runtime.vision.kind import Kind, kind_of

DEFAULT_PROMPTS: Final[Mapping[Kind, str]] = {
    "image": "Describe this image.",
    "video": "Describe this video.",
}
IMAGE: Final = "image"
BUILTIN: Final = ("name", "stem", "dir", "width", "height", IMAGE)
_KEY_COLUMNS: Final = ("path", "file", "filename", "file_name", "image", "name")
_TOKEN: Final = re.compile(r"\{(\{\w+\})\}|\{(\w+)\}")
_MARK: Final = "\0"  # where the picture goes, once a template is filled; no file holds it


@dataclass(frozen=True)
class Prompt:
    """The user's words around the picture; `text` is what the record shows."""

    before: str
    after: str

    @property
    def text(self) -> str:
        return f"{self.before}{{image}}{self.after}" if self.before else self.after


class Template:
    """A text with places to fill.

    Args:
        text: see above.
        columns: names that may stand in braces besides the built-in ones.

    Raises:
        InputError: a name in braces that is not known, or `{image}` more than once.
    """

    def __init__(self, text: str, columns: Collection[str] = ()) -> None:
        self.text = text
        self.names = tuple(name for _, name in _TOKEN.findall(text) if name)
        known = (*BUILTIN, *columns)
        if unknown := [name for name in self.names if name not in known]:
            raise InputError(
                f"the prompt has {{{unknown[0]}}}, which is not known",
                hint=f"known are {', '.join(known)}; {{{{{unknown[0]}}}}} stands for itself",
            )
        if self.names.count(IMAGE) > 1:
            raise InputError("the prompt has {image} more than once", hint="it holds one picture")

    def fill(self, values: Mapping[str, object]) -> Prompt:
        """Put the values in; a value is never read as a template."""

        def replace(match: re.Match[str]) -> str:
            literal, name = match.groups()
            return literal or (_MARK if name == IMAGE else str(values[name]))

        before, mark, after = _TOKEN.sub(replace, self.text.replace(_MARK, "")).partition(_MARK)
        return Prompt(before, after) if mark else Prompt("", before)


def read_prompt(file: Path) -> str:
    """The text of a prompt file.

    Raises:
        FileNotFoundError: there is none. InputError: it cannot be read, or is no text.
    """
    try:
        return file.read_text(encoding="utf-8-sig").strip("\n")
    except UnicodeDecodeError as e:
        raise InputError(f"{file}: the prompt is no text in UTF-8 (byte {e.start})") from e
    except OSError as e:
        if e.errno in (errno.ENOENT, errno.ENAMETOOLONG):  # no file can have so long a name
            raise FileNotFoundError(e.errno, e.strerror, str(file)) from e
        raise InputError(f"{file}: the prompt cannot be read: {e.strerror}") from e


@dataclass(frozen=True)
class Variables:
    """The rows of a CSV file, found by path, by file name or by stem.

    Attributes:
        columns: their names, the key's left out.
    """

    path: Path
    columns: tuple[str, ...]
    rows: Mapping[str, Mapping[str, str]] = field(repr=False)

    @classmethod
    def read(cls, path: Path) -> Variables:
        """Read a CSV file with a header; one column (path, file, filename, image or name) names the picture.

        Raises:
            InputError: no such file, no such column, or rows that do not fit the header.
        """
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file, strict=True)
                columns = tuple(reader.fieldnames or ())
                rows = list(reader)
        except (OSError, UnicodeDecodeError, csv.Error) as e:
            raise InputError(f"{path}: cannot be read as CSV: {getattr(e, 'strerror', None) or e}") from e
        key = next((name for name in _KEY_COLUMNS if name in columns), None)
        if not columns:
            raise InputError(f"{path}: empty, expected CSV with a header")
        if key is None:
            raise InputError(
                f"{path}: no column names the pictures, only {', '.join(columns)}",
                hint=f"name one of them {', '.join(_KEY_COLUMNS[:3])}",
            )
        for number, row in enumerate(rows, 2):
            if None in row or None in row.values():
                raise InputError(f"{path}: row {number} does not have {len(columns)} fields")
        named = {str(Path(row[key])): row for row in rows}
        return cls(path, tuple(name for name in columns if name != key), named)

    def row(self, image: Path) -> Mapping[str, str]:
        """The row about a picture.

        Raises:
            InputError: there is none.
        """
        for name in (str(image), str(image.absolute()), image.name, image.stem):
            if name in self.rows:
                return self.rows[name]
        for name in (str(image), image.name, image.stem):
            if not name.isascii() and (same := by_composition(name, self.rows)) is not None:
                return self.rows[same]
        raise InputError(
            f"{image}: no row in {self.path}", hint="add one, or leave the column out of the prompt"
        )


@dataclass(frozen=True)
class Prompts:
    """The prompt of every picture.

    Attributes:
        template: for what has no prompt file of its own; None is the default for a picture or a video.
        caption: the default for a picture in place of `DEFAULT_PROMPTS`; text, not a template.
        variables: what the columns in braces mean.
        beside: whether `photo.prompt.txt` or `photo.jpg.prompt.txt` beside `photo.jpg` is its prompt.
    """

    template: Template | None = None
    variables: Variables | None = None
    beside: bool = True
    caption: str | None = None

    def of(self, path: str, width: int, height: int) -> Prompt:
        """The prompt of a picture of width x height pixels, upright.

        Raises:
            InputError: its prompt file cannot be read or used, or its row is missing.
        """
        image = Path(path)
        template = self._own(image) or self.template
        if template is None:
            kind = kind_of(image) or "image"
            return Prompt("", (self.caption if kind == IMAGE else None) or DEFAULT_PROMPTS[kind])
        values: dict[str, object] = {
            "name": image.name,
            "stem": image.stem,
            "dir": image.absolute().parent.name,
            "width": width,
            "height": height,
        }
        if self.variables is not None and any(name in self.variables.columns for name in template.names):
            values = {**self.variables.row(image), **values}
        return template.fill(values)

    def _own(self, image: Path) -> Template | None:
        if not self.beside:
            return None
        for file in (image.with_name(f"{image.name}.prompt.txt"), image.with_suffix(".prompt.txt")):
            try:
                text = read_prompt(file)
            except FileNotFoundError:
                continue
            try:
                return Template(text, self.variables.columns if self.variables else ())
            except InputError as e:
                raise InputError(f"{file}: {e.message}", hint=e.hint) from e
        return None
