"""Files, and nothing that only stands where a file could; paths with `~`."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO, Final

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
