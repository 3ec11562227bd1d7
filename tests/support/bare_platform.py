"""Runs qvl's command line on a Python that lacks what Linux alone, or Unix alone, has.

    python bare_platform.py ARGUMENTS…

Modules cannot be imported, functions and flags of `os` are gone, /proc is empty, and `os.replace` refuses a
target that this process has open, as Windows does. (`sys.platform` stays: libraries choose their files by
it.)
"""
# ruff: noqa: PTH110, PTH112, PTH113, PTH116

from __future__ import annotations

import builtins
import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

MODULES: Final = ("fcntl", "termios", "tty", "pty", "readline", "resource", "pwd", "grp", "syslog")
FUNCTIONS: Final = (
    "wait4", "wait3", "sysconf", "sched_getaffinity", "pwrite", "pread", "fork", "forkpty", "getuid",
    "geteuid", "fchmod", "chown", "mkfifo", "getloadavg", "posix_fallocate", "sendfile", "copy_file_range",
)  # fmt: skip
FLAGS: Final = ("O_NOFOLLOW", "O_NONBLOCK", "O_DIRECTORY", "O_CLOEXEC", "O_SYNC")
SIGNALS: Final = ("SIGHUP", "SIGALRM", "SIGKILL", "SIGPIPE", "SIGUSR1", "SIGUSR2", "SIGCHLD", "SIGQUIT")


def open_here() -> set[tuple[int, int]]:
    """Device and inode of every regular file that this process has open."""
    found = set()
    for number in range(256):
        try:
            status = os.fstat(number)
        except OSError:
            continue
        found.add((status.st_dev, status.st_ino))
    return found


def strip() -> None:
    """Take away what other systems lack."""
    import shutil
    import subprocess  # they look for some of it when they are imported, and have their own ways without
    import tempfile  # noqa: F401

    del shutil, subprocess
    for name in MODULES:
        sys.modules[name] = None  # type: ignore[assignment]
    for module, names in ((os, (*FUNCTIONS, *FLAGS)), (signal, SIGNALS)):
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
    os.replace = refusing(os.replace)
    os.rename = refusing(os.rename)
    builtins.open = without_proc(builtins.open)
    io.open = without_proc(io.open)
    real_fsync = os.fsync

    def fsync(handle: int) -> None:
        if not os.path.isfile(f"/dev/fd/{handle}"):  # Windows syncs no folders
            raise PermissionError(13, "Permission denied")
        real_fsync(handle)

    os.fsync = fsync


def refusing(real: Callable[..., None]) -> Callable[..., None]:
    def replace(source: Any, target: Any, **more: Any) -> None:
        opened = open_here()
        for path in (source, target):
            if os.path.exists(path) and not os.path.isdir(path):
                status = os.stat(path)
                if (status.st_dev, status.st_ino) in opened:
                    error = PermissionError(13, "The process cannot access the file", os.fspath(path))
                    error.winerror = 32  # type: ignore[attr-defined]
                    raise error
        real(source, target, **more)

    return replace


def without_proc(real: Callable[..., Any]) -> Callable[..., Any]:
    def opened(file: Any, *rest: Any, **more: Any) -> Any:
        if isinstance(file, str | Path) and str(file).startswith("/proc/"):
            raise FileNotFoundError(2, "No such file or directory", str(file))
        return real(file, *rest, **more)

    return opened


if __name__ == "__main__":
    strip()
    from qvl.cli.__main__ import main

    main()
