"""Inputs of commands: guards against overwriting them, and keeps what pipes give as files."""

from __future__ import annotations

import hashlib
import os
import select
import stat
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from qvl.cli.output import Output
from qvl.runtime.errors import InputError, OutputError
from qvl.runtime.files import expanded, state_dir

_MOST_BYTES: Final = 1 << 30
_KEPT: Final = 32
_WAIT_SECONDS: Final = 1.0
_PICTURES: Final = (
    (b"\x89PNG", ".png"), (b"\xff\xd8\xff", ".jpg"), (b"GIF8", ".gif"), (b"BM", ".bmp"),
    (b"II*\0", ".tif"), (b"MM\0*", ".tif"),
)  # fmt: skip


def refuse_stdout(inputs: Iterable[Path]) -> None:
    """See that stdout is not redirected onto a file that is read. Raises OutputError."""
    try:
        out = os.fstat(sys.stdout.fileno())
    except (OSError, ValueError):  # closed, or replaced by something without a descriptor
        return
    if not stat.S_ISREG(out.st_mode):
        return
    for path in inputs:
        try:
            found = path.stat()
        except (OSError, ValueError):
            continue
        if (found.st_dev, found.st_ino) == (out.st_dev, out.st_ino):
            what = f"{path}: is an input, and stdout is sent to it"
            raise OutputError(what, hint="choose another file")


def is_pipe(name: str) -> bool:
    """Return whether a name is a pipe that a shell made: `<(…)` in bash and zsh, /dev/stdin."""
    if not name.startswith(("/dev/fd/", "/proc/self/fd/", "/dev/stdin")):
        return False
    try:
        return stat.S_ISFIFO(os.stat(name).st_mode)  # noqa: PTH116 - resolving would lose the pipe
    except OSError:
        return False


def picture_of(data: bytes) -> str | None:
    """The suffix of the picture that bytes hold, by their beginning; None if they hold none."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return ".webp"
    if data[4:8] == b"ftyp":
        return ".avif" if data[8:12] == b"avif" else ".heic" if data[8:11] in (b"hei", b"mif") else None
    return next((suffix for lead, suffix in _PICTURES if data.startswith(lead)), None)


def kept(data: bytes, what: str) -> Path:
    """A file with the bytes of a picture that came through a pipe; the latest stay for `--continue`.

    Raises:
        InputError: the bytes are no picture. OutputError: they cannot be kept.
    """
    suffix = picture_of(data)
    if suffix is None:
        found = "nothing" if not data else f"data that begins with {data[:12]!r}"
        raise InputError(f"{what}: expected a picture, found {found}")
    folder = state_dir() / "pictures"
    path = folder / f"{hashlib.sha256(data).hexdigest()[:16]}{suffix}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            from qvl.runtime.atomic import PRIVATE, write_whole

            write_whole(path, data, mode=PRIVATE)
        path.touch()
        for old in sorted(folder.iterdir(), key=lambda p: p.stat().st_mtime)[:-_KEPT]:
            old.unlink(missing_ok=True)
    except OSError as e:
        raise OutputError(f"{path}: cannot be written: {e.strerror}") from e
    return path


def read_pipe(name: str) -> Path:
    """A file with what a shell's pipe holds. Raises InputError."""
    with open(name, "rb") as f:  # noqa: PTH123 - a descriptor, not a file
        return kept(f.read(_MOST_BYTES), name)


def read_stdin(out: Output) -> bytes:
    """All of stdin; where nothing comes for a second, it is said what is waited for."""
    stream = getattr(sys.stdin, "buffer", None)
    if stream is None:  # replaced by something that has text alone
        return sys.stdin.read().encode("utf-8", "surrogateescape")
    try:
        if not select.select([stream], [], [], _WAIT_SECONDS)[0]:
            out.note("reading stdin (Ctrl-D ends it)")
    except (OSError, ValueError):  # Windows selects sockets only
        pass
    data: bytes = stream.read(_MOST_BYTES)
    return data


def has_piped_input() -> bool:
    """Return whether stdin is a pipe, or a file at its beginning (a shell's loop has read some of it)."""
    try:
        found = os.fstat(sys.stdin.fileno())
        if stat.S_ISREG(found.st_mode):
            return found.st_size > 0 and os.lseek(sys.stdin.fileno(), 0, os.SEEK_CUR) == 0
        return stat.S_ISFIFO(found.st_mode)
    except (OSError, ValueError):
        return False


def as_text(data: bytes) -> str:
    """Text from a pipe: UTF-16 by its mark, else UTF-8, with a replacement for bytes that are neither."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", "replace")
    return data.decode("utf-8-sig", "replace")


def read_schema_option(value: str | None) -> dict[str, object] | None:
    """The schema that `--schema` gives: the JSON itself, or the name of a file with it.

    Raises:
        InputError: no JSON schema.
    """
    if value is None:
        return None
    from qvl.runtime.grammar import schema

    if not value.lstrip().startswith("{"):
        return schema.read_schema(expanded(value))
    import json

    try:
        found = json.loads(value)
        schema.schema_to_grammar(found)
    except ValueError as e:
        if isinstance(e, InputError):
            raise InputError(f"--schema: {e.message}", hint=e.hint) from e
        raise InputError(f"--schema: not JSON: {e}", hint="quotes around it keep it whole: '{…}'") from e
    return dict(found)
