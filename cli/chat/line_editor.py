'''Reading what the user types: history, completion of commands and paths, and """ for several lines.'''

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

from qvl.runtime.files import state_dir

FENCE: Final = '"""'
_HISTORY_LENGTH: Final = 1000
_ESCAPED: Final = " \t'\"()[]{}&;<>|*?$`\\!#"


class LineReader:
    """The prompt of a conversation.

    On a terminal readline edits the line, with a history kept under XDG_STATE_HOME/qvl; elsewhere lines are
    read as they come.

    Args:
        commands: the slash commands to complete, with the slash.

    Attributes:
        typed: Ctrl-C has dropped something.
    """

    def __init__(self, commands: Iterable[str]) -> None:
        self._commands = sorted(commands)
        self._history = state_dir() / "history"
        self._readline: Any = None
        self._matches: list[str] = []
        self._draft = ""
        self.typed = False
        if sys.stdin.isatty() and sys.stdout.isatty():
            self._set_up_readline()

    def _set_up_readline(self) -> None:
        try:
            import readline
        except ImportError:  # a Python built without it, as on Windows
            return
        self._readline = readline
        readline.set_completer(self._complete)
        readline.set_completer_delims(" \t\n")
        uses_libedit = "libedit" in (readline.__doc__ or "")
        readline.parse_and_bind("bind ^I rl_complete" if uses_libedit else "tab: complete")
        readline.set_history_length(_HISTORY_LENGTH)
        try:
            readline.read_history_file(self._history)
        except OSError:  # the first time, or a file of another user
            return

    def close(self) -> None:
        """Keep the history for the next time."""
        if self._readline is None:
            return
        try:
            self._history.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._readline.write_history_file(self._history)
        except OSError:  # no home to keep it in is no reason to fail at leaving
            return

    def offer(self, draft: str) -> None:
        """Put a text on the next prompt for the user to change; without readline it is only shown."""
        self._draft = draft

    def read(self, prompt: str, more: str = "... ") -> str:
        '''One message: a line, or everything between """ and """.

        Raises:
            EOFError: the input is at its end. KeyboardInterrupt: Ctrl-C.
        '''
        self.typed = False
        line = self._line(prompt)
        stripped = line.lstrip()
        if not stripped.startswith(FENCE):
            return line
        lines = [stripped.removeprefix(FENCE)]
        while FENCE not in lines[-1]:
            self.typed = True
            lines.append(self._line(more))
        lines[-1] = lines[-1].partition(FENCE)[0]
        return "\n".join(lines).strip("\n")

    def _line(self, prompt: str) -> str:
        draft, self._draft = self._draft, ""
        if self._readline is None:
            if sys.stdin.isatty():
                sys.stderr.write(prompt)
                sys.stderr.flush()
            line = sys.stdin.readline()
            if not line:
                raise EOFError
            return line.rstrip("\r\n")
        hook: Callable[[], None] | None = (lambda: self._readline.insert_text(draft)) if draft else None
        self._readline.set_startup_hook(hook)
        try:
            return input(prompt)
        except KeyboardInterrupt:
            self.typed = self.typed or bool(self._readline.get_line_buffer())
            raise
        finally:
            self._readline.set_startup_hook(None)

    # completion ------------------------------------------------------------------------------------

    def _complete(self, text: str, state: int) -> str | None:
        if state == 0:
            line = self._readline.get_line_buffer()
            at_start = not line[: self._readline.get_begidx()].strip()
            self._matches = self.completions(text, at_start)
        return self._matches[state] if state < len(self._matches) else None

    def completions(self, text: str, at_start: bool) -> list[str]:
        """What a word could become: a command at the start of a line, and a path everywhere."""
        is_command = at_start and text.startswith("/")
        return [f"{c} " for c in self._commands if is_command and c.startswith(text)] or path_completions(
            text
        )


def path_completions(text: str) -> list[str]:
    """The paths that begin with text, with spaces escaped and `~` kept as it was typed."""
    plain = text.replace("\\", "")
    folder, _, stem = plain.rpartition("/")
    root = Path(f"{folder}/" if "/" in plain else ".").expanduser()
    try:
        entries = sorted(root.iterdir())
    except (OSError, RuntimeError):  # no such folder, or ~ of a user unknown
        return []
    lead = plain[: len(plain) - len(stem)]
    return [
        _escape(f"{lead}{entry.name}") + ("/" if entry.is_dir() else "")
        for entry in entries
        if entry.name.startswith(stem) and (stem.startswith(".") or not entry.name.startswith("."))
    ]


def _escape(path: str) -> str:
    return "".join(f"\\{c}" if c in _ESCAPED else c for c in path)
