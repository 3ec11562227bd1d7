"""Lays plain text out in the columns of a terminal: tables, lists of definitions, wrapped lines."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from typing import Final, TextIO

_NARROWEST: Final = 20
_GAP: Final = 2
_HANG: Final = 2
_NO_BREAK: Final = "\x00"  # textwrap breaks at none but white space


def columns(stream: TextIO) -> int | None:
    """The width of the terminal that a stream writes to, COLUMNS before its own; None without a terminal."""
    if not stream.isatty():
        return None
    given = os.environ.get("COLUMNS", "")
    try:
        width = int(given) if given.isdecimal() else os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        width = 0
    return max(width, _NARROWEST) if width else 80


def wrapped(text: str, width: int | None) -> str:
    """Text with lines that are too long broken at blanks, the rest of each indented as its beginning.

    A line that shows a command ("  qvl …") stays whole, so that it can be copied.
    """
    if width is None:
        return text
    return "\n".join(_broken(line, width) for line in text.split("\n"))


def _broken(line: str, width: int, hang: int = 0) -> str:
    if len(line) <= width or line.startswith("  qvl "):
        return line
    indent = line[: len(line) - len(line.lstrip())]
    rest = f"{indent}{' ' * hang}"
    lines = textwrap.wrap(
        line.lstrip(),
        width,
        initial_indent=indent,
        subsequent_indent=rest if len(rest) < width // 2 else "",
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join(lines)


def format_table(
    rows: Sequence[Sequence[str]],
    header: Sequence[str] | None = None,
    indent: int = 0,
    width: int | None = None,
) -> str:
    """Columns of plain text: the first aligned left, the others right, two spaces between.

    A table that is wider than `width` is folded: the first cell of each row on a line of its own, below it
    the others with the names of their columns.
    """
    lines = [header, *rows] if header else [*rows]
    n_columns = max(map(len, lines), default=0)
    widths = [max(len(row[i]) for row in lines if i < len(row)) for i in range(n_columns)]
    pad = " " * indent
    if width is not None and indent + sum(widths) + _GAP * (n_columns - 1) > width:
        return "\n".join(_folded(row, header, pad, width) for row in rows)

    def line(row: Sequence[str]) -> str:
        first, *rest = (*row, "")
        cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(rest, widths[1:], strict=False))]
        return (pad + "  ".join(cells)).rstrip()

    return "\n".join(map(line, lines))


def _folded(row: Sequence[str], header: Sequence[str] | None, pad: str, width: int) -> str:
    first, *rest = row
    names = header[1:] if header else [""] * len(rest)
    cells = [f"{name.strip()} {cell}".strip() for name, cell in zip(names, rest, strict=False) if cell]
    whole = ", ".join(cell.replace(" ", _NO_BREAK) for cell in cells)  # breaks between cells only
    below = _broken(f"{pad}    {whole}", width).replace(_NO_BREAK, " ") if cells else ""
    return "\n".join(filter(None, (_broken(f"{pad}{first}", width, _HANG), below)))


def definitions(rows: Sequence[tuple[str, str]], width: int | None, widest: int = 28, indent: int = 2) -> str:
    """Terms and what they mean, in two columns; in a narrow terminal the meaning goes below its term.

    Args:
        widest: a longer term has its meaning on the next line.
    """
    width = width or 100
    first = min(max((len(term) for term, _ in rows), default=0), widest)
    narrow = width < 2 * first + indent
    hang = " " * (indent + 4 if narrow else indent + first + _GAP)
    lines = []
    for term, meaning in rows:
        head = " " * indent + term
        texts = textwrap.wrap(meaning, max(_NARROWEST, width - len(hang)), break_on_hyphens=False) or [""]
        if not narrow and len(term) <= first:
            lines.append((head.ljust(len(hang)) + texts.pop(0)).rstrip())
        else:
            lines.append(_broken(head, width, _HANG))
        lines += [hang + text for text in texts if text]
    return "\n".join(lines)
