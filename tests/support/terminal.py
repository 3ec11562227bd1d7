"""Driving a program in a pseudo-terminal, as a person would."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from types import TracebackType

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\r")
TIMEOUT = 60.0


class Terminal:
    """A program with a terminal for stdin, stdout and stderr.

    Attributes:
        text: everything it has written so far, without escape sequences.
    """

    def __init__(
        self, args: Sequence[str], env: Mapping[str, str] | None = None, cwd: str | None = None
    ) -> None:
        self._fd, child = pty.openpty()
        self.process = subprocess.Popen(
            args,
            stdin=child,
            stdout=child,
            stderr=child,
            cwd=cwd,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "200", **(env or {})},
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(child)
        self._raw = b""
        self._seen = 0

    @property
    def text(self) -> str:
        return _ANSI.sub("", self._raw.decode("utf-8", "replace"))

    def type(self, keys: str) -> None:
        """Send keys as they are."""
        os.write(self._fd, keys.encode())

    def enter(self, line: str) -> None:
        """Type a line and press Enter."""
        self.type(f"{line}\r")

    def expect(self, pattern: str, timeout: float = TIMEOUT) -> re.Match[str]:
        """Wait until a regular expression appears after what was last expected."""
        deadline = time.monotonic() + timeout
        while True:
            if match := re.compile(pattern).search(self.text, self._seen):
                self._seen = match.end()
                return match
            if not self._read(deadline - time.monotonic()):
                raise AssertionError(f"no {pattern!r} in what came after: {self.text[self._seen :]!r}")

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        self.type("\x03")

    def interrupt_until(self, pattern: str, timeout: float = TIMEOUT) -> re.Match[str]:
        """Press Ctrl-C until a pattern appears: right after its prompt readline can miss one."""
        deadline = time.monotonic() + timeout
        while True:
            self.interrupt()
            try:
                return self.expect(pattern, min(3.0, timeout))
            except AssertionError:
                if time.monotonic() > deadline:
                    raise

    def leave(self) -> int:
        """Press Ctrl-D and wait for the exit code."""
        self.type("\x04")
        return self.exit_code()

    def exit_code(self, timeout: float = TIMEOUT) -> int:
        deadline = time.monotonic() + timeout
        while self._read(deadline - time.monotonic()):
            pass
        return self.process.wait(max(0.1, deadline - time.monotonic()))

    def _read(self, timeout: float) -> bool:
        """Take what the program writes next; False at its end or at the timeout."""
        ready, _, _ = select.select([self._fd], [], [], max(0.0, timeout))
        try:
            chunk = os.read(self._fd, 65536) if ready else b""
        except OSError:  # Linux: the other end is closed
            return False
        self._raw += chunk
        return bool(chunk)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        os.close(self._fd)


def _take_terminal() -> None:
    """Make the pseudo-terminal the controlling one, so that Ctrl-C becomes SIGINT."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
