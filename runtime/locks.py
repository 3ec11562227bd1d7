"""Locks that keep two runs from writing one file.

The lock lies on a small file beside the target, `.NAME.lock`. It is the kernel's (flock, or LockFileEx on
Windows, by the filelock library) and ends with the process, however that ends. A file system that has no
locks, as some network mounts, gets a file created with O_EXCL that names the process and its host,
`.NAME.lock.pid`: one whose process on this host is gone is removed, one from another host is named in the
error.
"""

from __future__ import annotations

import errno
import hashlib
import os
import warnings
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from qvl.runtime.atomic import write_error
from qvl.runtime.errors import OutputError

if TYPE_CHECKING:
    from filelock import BaseFileLock

_CANNOT_LOCK: Final = (
    errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF,
)  # fmt: skip
_PATIENCE: Final = 0.3  # seconds: for a lock that is being released, or a stale one being removed
_LONGEST: Final = 200  # bytes of a name; a prefix and a suffix are added


class Lock:
    """Holds a target until it is released. Take it before writing, keep it until after the rename.

    Args:
        target: the file to be written; its folder must exist.
        name: how messages name the target.

    Raises:
        OutputError: another process holds it, or no lock file can be made in the folder.
    """

    def __init__(self, target: Path, name: Path | None = None) -> None:
        self._path = beside(target, ".lock")
        self._unlinks = os.name != "nt"  # there, and with lock files, filelock removes the file itself
        name = name or target
        try:
            self._lock = self._acquire(name)
        except OSError as error:
            raise write_error(name, error) from error

    def _acquire(self, name: Path) -> BaseFileLock:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns where only lock files are to be had
            import filelock
        soft = self._path.with_name(f"{self._path.name}.pid")
        busy = f"{name}: another run is writing to it"
        if filelock.FileLock is not filelock.SoftFileLock:
            hard = filelock.FileLock(self._path, thread_local=False, fallback_to_soft=False)
            try:
                hard.acquire(timeout=_PATIENCE, poll_interval=_PATIENCE / 5)
                return hard
            except filelock.Timeout as error:
                raise OutputError(
                    busy, hint="wait for it or stop it (Ctrl-C), or choose another output"
                ) from error
            except OSError as error:
                if error.errno not in _CANNOT_LOCK:
                    raise
                with suppress(OSError):
                    self._path.unlink(missing_ok=True)
        self._unlinks = False
        by_file = filelock.SoftFileLock(soft, thread_local=False)
        try:
            by_file.acquire(timeout=_PATIENCE, poll_interval=_PATIENCE / 5)
        except filelock.Timeout as error:
            raise OutputError(
                f"{busy}: {soft} says so ({_holder(soft)}); this file system cannot lock",
                hint=f"wait for it; if no such process runs, remove {soft}",
            ) from error
        return by_file

    def release(self) -> None:
        """Let others in. Doing it twice is harmless."""
        if not self._lock.is_locked:
            return
        if self._unlinks:
            with suppress(OSError):
                # While the lock is held: filelock checks after locking that what it locked still has a name.
                self._path.unlink()
        with suppress(OSError):
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def beside(target: Path, suffix: str) -> Path:
    """A hidden name beside a target; a long one is shortened to its beginning and a digest."""
    raw = os.fsencode(target.name)
    name = target.name
    if len(raw) > _LONGEST:
        name = f"{name[:40]}-{hashlib.blake2b(raw, digest_size=8).hexdigest()}"
    return target.with_name(f".{name}{suffix}")


def _holder(path: Path) -> str:
    """The holder by a lock file: "process 12 on laptop"."""
    try:
        pid, host = path.read_text(encoding="utf-8", errors="replace").split("\n")[:2]
    except (OSError, ValueError):
        return "a process that is not named"
    return f"process {pid[:20]} on {host[:100]!r}"
