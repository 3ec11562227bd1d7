"""Opens regular files only, no pipes or devices; identifies files by content; state and cache folders."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO, Final

_FLAGS: Final = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file to be read. A pipe or a device, which could keep the reader waiting for ever, is refused.

    Raises:
        OSError: it is no file, or cannot be read. ValueError: a NUL in the path.
    """
    handle = os.open(path, _FLAGS)  # without O_NONBLOCK, opening a pipe would wait for its writer
    try:
        mode = os.fstat(handle).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        if not stat.S_ISREG(mode):
            what = "expected a file, found a pipe, a socket or a device"
            raise OSError(errno.EINVAL, what, os.fspath(path))
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def is_there(path: Path) -> bool:
    """Whether a path names something, be it a link that leads nowhere; not where that may not be seen."""
    try:
        return path.exists() or path.is_symlink()
    except (OSError, ValueError):  # no right to look, a name too long, or a null byte
        return False


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path with `~` or `~name` in place of a home, or as it is where there is no such home."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - that of Path raises


def default_directory() -> Path:
    """$XDG_CACHE_HOME/qvl/embeddings, or ~/.cache/qvl/embeddings."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    base = Path(home) if Path(home).is_absolute() else Path.home() / ".cache"
    return base / "qvl" / "embeddings"


def file_identity(path: str | os.PathLike[str]) -> str:
    """A name for an mmproj's content: its size, its beginning, and blocks spread over the rest.

    Reads 2 MB of a file of any size. Tells apart models, types and training runs, not two files that differ
    in a single tensor between the blocks.

    Raises:
        OSError: the file cannot be read.
    """
    block, n_blocks = 16 << 10, 64
    with Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(f"{size} ".encode())
        digest.update(file.read(1 << 20))
        for i in range(n_blocks):
            file.seek(max(0, size - block) * (i + 1) // n_blocks)
            digest.update(file.read(block))
    return digest.hexdigest()


def state_dir() -> Path:
    """XDG_STATE_HOME/qvl, where the history and the sessions are."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "qvl"


def as_json(value: Any, *, indent: int | None = None) -> str:
    """JSON in plain UTF-8; where a file name is no valid UTF-8, all is escaped."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # lone surrogates, with which Python stands in for stray bytes
        return json.dumps(value, indent=indent)
    return text
