"""Opens regular files only, no pipes or devices; identifies files by content; state and cache folders."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO, Final

from qvl.runtime.errors import BackendError, FormatError, InputError

_RESERVED: Final = re.compile(r"(?i)(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])( *[.:].*)?")
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


class MappedFile:
    """A file that C code reads through a memory map, where a page beyond a shortened file's end is SIGBUS.

    Args:
        path: as it was opened; its size now is what `check` expects later.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stat = path.stat()
        self._process = os.getpid()

    @property
    def is_ours(self) -> bool:
        """Whether this process opened it; False in a forked child."""
        return self._process == os.getpid()

    def check_process(self) -> None:
        """See that this process opened the file: a forked child has none of the threads that compute.

        Raises:
            BackendError: another process opened it.
        """
        if not self.is_ours:
            raise BackendError(
                f"{self.path} was loaded in another process; load it in this one",
                hint='start processes with "spawn" (multiprocessing.get_context) and load the model in each',
            )

    def check(self) -> None:
        """See that the file is still as long as it was; one that was replaced or removed stays mapped.

        Raises:
            FormatError: it was shortened in place.
            BackendError: another process opened it.
        """
        self.check_process()
        try:
            now = self.path.stat()
        except OSError:
            return
        same = (now.st_dev, now.st_ino) == (self._stat.st_dev, self._stat.st_ino)
        if same and now.st_size < self._stat.st_size:
            raise FormatError(
                f"{self.path}: {now.st_size} bytes, {self._stat.st_size} when it was opened: "
                "it was shortened while in use",
                hint="replace model files by renaming, as qvl convert does, and open the model again",
            )


def is_there(path: Path) -> bool:
    """True if a path names something, also a dangling link; False where that may not be seen."""
    try:
        return path.exists() or path.is_symlink()
    except (OSError, ValueError):  # no right to look, a name too long, or a null byte
        return False


def is_portable(name: str) -> bool:
    """Whether every system takes a file of this name as it is.

    Windows has names for devices (NUL, COM1, with any suffix), gives `:` a meaning, refuses `<>"|?*` and
    drops dots and spaces at the end.
    """
    if not name or name[-1] in ". " or _RESERVED.fullmatch(name):
        return False
    return not any(c < " " or c in '<>:"/\\|?*' for c in name)


def ignores_case(folder: Path) -> bool:
    """Whether `A` and `a` are one file there, as on macOS and Windows; False where that cannot be seen."""
    for path in (folder.absolute(), *folder.absolute().parents):
        other = path.with_name(path.name.swapcase())
        if other.name != path.name and os.path.lexists(path):
            try:
                return other.samefile(path)
            except (OSError, ValueError):
                return False
    return False


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path with `~` or `~name` in place of a home, or as it is where there is no such home."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - that of Path raises


def default_directory() -> Path:
    """$XDG_CACHE_HOME/qvl/embeddings, or ~/.cache/qvl/embeddings.

    Raises:
        InputError: there is no home folder.
    """
    return _base("XDG_CACHE_HOME", ".cache") / "qvl" / "embeddings"


def _base(variable: str, below_home: str) -> Path:
    named = os.environ.get(variable, "")
    if Path(named).is_absolute():  # the XDG specification has relative paths ignored
        return Path(named)
    home = expanded("~")
    if not home.is_absolute():
        raise InputError("this user has no home folder", hint=f"set HOME, or {variable}, to a folder")
    return home / below_home


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
    """$XDG_STATE_HOME/qvl, or ~/.local/state/qvl: the history and the sessions.

    Raises:
        InputError: there is no home folder.
    """
    return _base("XDG_STATE_HOME", ".local/state") / "qvl"


_MAX_DEPTH: Final = 64
_BRACKETS: Final = re.compile(r'"(?:\\.|[^"\\])*"|[\[\]{}]')


def parse_json(text: str | bytes) -> Any:
    """Parse JSON that is nested no deeper than anything that qvl reads.

    Raises:
        ValueError: not JSON, not UTF-8, or nested deeper than 64 levels.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    if text.count("[") + text.count("{") > _MAX_DEPTH:  # only then can it be too deep
        depth = 0
        for found in _BRACKETS.finditer(text):
            depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
            if depth > _MAX_DEPTH:
                raise ValueError(f"nested deeper than {_MAX_DEPTH} levels")
    return json.loads(text)


def as_json(value: Any, *, indent: int | None = None, compact: bool = False) -> str:
    """JSON in plain UTF-8; where a string is not valid Unicode, such as some file names, all is escaped.

    Args:
        compact: without spaces after commas and colons.

    Raises:
        ValueError: with `compact`, a number that is not finite.
    """
    more: dict[str, Any] = {"separators": (",", ":"), "allow_nan": False} if compact else {"indent": indent}
    text = json.dumps(value, ensure_ascii=False, **more)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # lone surrogates, with which Python stands in for stray bytes
        return json.dumps(value, **more)
    return text
