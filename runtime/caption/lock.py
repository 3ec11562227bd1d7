"""One run at a time on one output."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from qvl.runtime.errors import OutputError

if sys.platform == "win32":  # there, to keep two runs apart is the user's part

    def _lock(handle: int) -> None:
        pass
else:
    import fcntl

    def _lock(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


class Lock:
    """A file that one process at a time has open; it stays, for it keeps notes between runs.

    The lock is the kernel's (`flock`), so it goes with the process, however that ends.

    Args:
        path: the file; made if it is not there.
        name: what the message calls the thing that is locked.

    Raises:
        OutputError: another process has it. OSError: it cannot be opened.
    """

    def __init__(self, path: Path, name: Path) -> None:
        self.path = path
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            _lock(self._handle)
        except BlockingIOError as e:
            os.close(self._handle)
            raise OutputError(
                f"{name}: another run is writing to it",
                hint="wait for it or stop it (Ctrl-C), or choose another output with -o",
            ) from e
        except OSError:
            pass  # a file system without locks, as some network mounts are

    def read(self) -> str:
        """The notes."""
        return self.path.read_text(encoding="utf-8", errors="replace")

    def append(self, line: bytes) -> None:
        """Add a line to the notes, durably."""
        os.write(self._handle, line)
        os.fsync(self._handle)

    def close(self) -> None:
        """Let others in."""
        os.close(self._handle)
