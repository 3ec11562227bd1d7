"""Writes files that appear whole or not at all.

The content goes to a temporary file in the same folder, is synced, and is renamed onto the target. The
temporary name is random and the file is created with O_EXCL (and O_NOFOLLOW where it exists), so a link
that somebody else placed in the folder is never followed.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final

from qvl.runtime.errors import OutputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PRIVATE: Final = 0o600
SHARED: Final = 0o666  # less the umask
FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FLAGS: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
_UNSYNCABLE: Final = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
_OPEN_ELSEWHERE: Final = (5, 32, 33)  # ERROR_ACCESS_DENIED, ERROR_SHARING_VIOLATION, ERROR_LOCK_VIOLATION
_RETRIES: Final = (0.02, 0.05, 0.1, 0.2)  # seconds; virus scanners and indexers open new files for a moment
_PREFIX: Final = 40  # characters of the target's name: 160 bytes at most, of the 255 that a name may have


@contextmanager
def replacing(path: Path, *, mode: int = SHARED, durable: bool = True) -> Iterator[BinaryIO]:
    """Yield a file to fill; when the body ends without an exception, it takes the place of `path`.

    Args:
        mode: permissions of the new file, less the umask.
        durable: sync it first; without that a power cut may leave a torn file under the final name.

    Raises:
        OSError: it cannot be created, written, synced or renamed; `path` is as it was.
    """
    file, temporary = create_temporary(path, mode=mode)
    try:
        with file:
            yield file
            file.flush()
            if durable:
                sync(file.fileno())
        put_in_place(temporary, path, durable=durable)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_whole(path: Path, data: bytes | str, *, mode: int = SHARED) -> None:
    """Write bytes, or text as UTF-8, in place of the content of `path`. Raises OSError."""
    with replacing(path, mode=mode) as file:
        file.write(data if isinstance(data, bytes) else data.encode("utf-8", "surrogateescape"))


def create_temporary(path: Path, *, mode: int = SHARED) -> tuple[BinaryIO, Path]:
    """Create an empty file beside `path`, open for reading and writing. Raises OSError."""
    temporary = path.with_name(f".{path.name[:_PREFIX]}.{secrets.token_hex(8)}.part")
    return os.fdopen(os.open(temporary, _FLAGS, mode), "w+b"), temporary


def put_in_place(temporary: Path, path: Path, *, durable: bool = True) -> None:
    """Rename a closed temporary file onto `path`.

    Raises:
        OSError: PermissionError where Windows refuses because another program has `path` open.
    """
    for pause in (*_RETRIES, None):
        try:
            os.replace(temporary, path)  # noqa: PTH105 - tests stand in for Windows here
        except PermissionError as error:
            if getattr(error, "winerror", None) not in _OPEN_ELSEWHERE:
                raise
            if pause is None:
                raise PermissionError(error.errno, "another program has it open", str(path)) from error
            time.sleep(pause)
        else:
            break
    if durable:
        sync_folder(path.parent)


def put_all_in_place(pairs: Sequence[tuple[Path, Path]]) -> None:
    """Rename several (temporary, path): all of them, or none.

    What the paths held before is kept under temporary names until the last rename, and put back if one
    fails. A process killed in between leaves some paths missing, never old files beside new ones.

    Raises:
        OSError: a file cannot be replaced; all paths hold what they held before.
    """
    kept: list[tuple[Path, Path]] = []
    placed: list[Path] = []
    try:
        for _, path in pairs:
            if path.exists() or path.is_symlink():
                aside = path.with_name(f".{path.name[:_PREFIX]}.{secrets.token_hex(8)}.part")
                put_in_place(path, aside)
                kept.append((aside, path))
        for temporary, path in pairs:
            put_in_place(temporary, path)
            placed.append(path)
    except BaseException:
        for path in placed:
            with suppress(OSError):
                path.unlink()
        for aside, path in kept:
            with suppress(OSError):
                put_in_place(aside, path)
        raise
    for aside, _ in kept:
        with suppress(OSError):
            aside.unlink()


def remove_leftovers(path: Path) -> None:
    """Remove temporary files that killed processes left beside `path`. Call it with the path's lock held."""
    name = re.compile(re.escape(f".{path.name[:_PREFIX]}.") + r"[0-9a-f]{16}\.part")
    with suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            if name.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                with suppress(OSError):
                    os.unlink(entry.path)  # noqa: PTH108


def sync(handle: int) -> None:
    """Flush a file to the medium itself; on macOS fsync stops at the drive's cache and F_FULLFSYNC does not.

    Raises:
        OSError: the medium is full or fails. File systems without fsync are accepted.
    """
    if hasattr(fcntl, "F_FULLFSYNC"):
        with suppress(OSError):  # not on every file system
            fcntl.fcntl(handle, fcntl.F_FULLFSYNC)
            return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _UNSYNCABLE:
            raise


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the system lets folders be synced; Windows does not."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def refuse_input(target: Path, inputs: Iterable[Path]) -> None:
    """See that a file to be written is none of those that are read.

    Raises:
        OutputError: it is one of them, by whatever name or link.
    """
    for path in inputs:
        try:
            same = target.samefile(path)
        except (OSError, ValueError):  # one of them is not there: they are two
            continue
        if same:
            raise OutputError(
                f"{target}: is an input, so it is not written to", hint="choose another name for the output"
            )


def write_error(path: Path, error: OSError, *, note: str = "", hint: str | None = None) -> OutputError:
    """An OSError met while writing, as the OutputError that names the file.

    Args:
        note: added to the message, such as the number of safe records.
        hint: what to do, unless the disk is full.
    """
    if error.errno in FULL:
        return OutputError(
            f"{path}: the disk is full{note}", hint="free some space, then run the same command again"
        )
    reason = error.strerror or str(error) or type(error).__name__
    return OutputError(
        f"{path}: cannot be written: {reason}{note}", hint=hint or "check the path and its permissions"
    )
