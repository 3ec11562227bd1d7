"""Gathers the pictures, videos and question of a command line."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import typer

from qvl.cli.chat.attachments import Attachment, attach, is_address
from qvl.cli.inputs import as_text, has_piped_input, is_pipe, kept, picture_of, read_pipe, read_stdin
from qvl.cli.output import Output
from qvl.runtime.errors import InputError
from qvl.runtime.files import expanded, is_there
from qvl.runtime.vision.kind import Kind, kind_of


@dataclass(frozen=True)
class Asked:
    """Attachments and question of a command line; without a question it begins a conversation."""

    attachments: list[Attachment]
    question: str | None


def gather(
    words: Sequence[str], images: Sequence[str], videos: Sequence[str], prompt: str | None, out: Output
) -> Asked:
    """Take pictures, videos and the question from arguments, options and stdin.

    Raises:
        BadParameter: two questions, or none where nobody can be asked. InputError: what cannot be attached.
    """
    found = [a for name in images for a in _attached(name, "image", out)]
    found += attach(list(videos), "video") if videos else []
    question: list[str] = []
    for word in words:
        kind = "image" if word == "-" else _kind(word)
        if kind:
            found += _attached(word, kind, out)
        else:
            question.append(word)
    if question and prompt is not None:
        raise typer.BadParameter(f"the question is given already: {' '.join(question)!r}", param_hint="-p")
    text = " ".join(question) if question else prompt
    stdin_is_taken = "-" in images or "-" in words
    if text == "-":
        text = as_text(read_stdin(out))
    elif not stdin_is_taken and (has_piped_input() or (text is None and not sys.stdin.isatty())):
        data = read_stdin(out)
        if picture_of(data):
            found += attach([str(kept(data, "stdin"))], "image")
        elif context := as_text(data).strip("\r\n"):
            if text is not None:
                out.detail(f"{len(context)} characters from stdin go before the question")
            text = context if text is None else f"{context}\n\n{text}"
    if text is None and sys.stdin.isatty():
        return Asked(found, None)
    if text is None or not text.strip():
        missing = "no question is given, and stdin is empty"
        empty = "the prompt is empty" if prompt is not None or question else missing
        raise typer.BadParameter(empty, param_hint="-p")
    return Asked(found, text.rstrip("\r\n"))


def _kind(word: str) -> Kind | None:
    """True if an argument is a picture or a video; None for a question."""
    if is_pipe(word):
        return "image"
    path = expanded(word)
    kind = kind_of(path)
    if is_there(path):
        return "video" if path.is_dir() and "/" in word else kind or ("image" if "/" in word else None)
    # a name without blanks that no file has: it is an error, as with --image
    return kind if kind and not re.search(r"\s", word) else "image" if is_address(word) else None


def _attached(name: str, kind: Kind, out: Output) -> list[Attachment]:
    if name == "-":
        data = read_stdin(out)
        if not data:
            raise InputError("stdin: expected a picture, found nothing")
        return attach([str(kept(data, "stdin"))], "image")
    if is_pipe(name):
        return attach([str(read_pipe(name))], "image")
    return attach([str(expanded(name))], kind)
