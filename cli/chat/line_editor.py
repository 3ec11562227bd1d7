'''Reads what the user types: history, completion, several lines pasted or between """ and """.'''

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias

from qvl.cli.chat.attachments import clean_path
from qvl.runtime.files import state_dir

FENCE: Final = '"""'
_HISTORY_LENGTH: Final = 1000
_ESCAPED: Final = " \t'\"()[]{}&;<>|*?$`\\!#"
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")

Choices: TypeAlias = Callable[[], Iterable[str]]
"""Gives the possible arguments of a command; None for paths."""


class LineReader:
    """The prompt of a conversation.

    On a terminal readline edits the line, with a history kept under XDG_STATE_HOME/qvl; elsewhere, and where
    there is no readline, lines are read as they come.

    Args:
        commands: the slash commands to complete, without the slash, with their possible arguments.

    Attributes:
        typed: whether Ctrl-C has dropped something.
    """

    def __init__(self, commands: Mapping[str, Choices | None]) -> None:
        self._commands = commands
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
        if not uses_libedit:  # pasted lines arrive as one, to be sent by Enter
            readline.parse_and_bind("set enable-bracketed-paste on")
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
        """Put a text on the next prompt for the user to change; without readline nothing is put there."""
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
            try:
                lines.append(self._line(more))
            except EOFError:  # Ctrl-D drops the message, and does not end the conversation
                if sys.stdin.isatty():
                    raise KeyboardInterrupt from None
                raise
        lines[-1] = lines[-1].partition(FENCE)[0]
        return "\n".join(lines).strip("\n")

    def confirms(self, question: str) -> bool:
        """True if the user answers yes; never where nobody can answer."""
        if not sys.stdin.isatty():
            return False
        try:
            return self._line(question).strip().lower() in ("y", "yes")
        except EOFError:
            return False

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
            before = self._readline.get_line_buffer()[: self._readline.get_endidx()]
            # readline's word begins after the last blank, ours perhaps earlier: that blank may be escaped
            known = len(last_word(before)) - len(text)
            self._matches = [found[known:] for found in self.completions(before)]
        return self._matches[state] if state < len(self._matches) else None

    def completions(self, line: str) -> list[str]:
        """Completions of the last word of a line: a command, its argument, or a path."""
        word = last_word(line)
        before = line[: len(line) - len(word)].strip()
        if not before and word.startswith("/"):
            found = [f"/{name} " for name in sorted(self._commands) if name.startswith(word[1:])]
            return found or path_completions(word)
        choices = self._commands.get(before.removeprefix("/")) if before.startswith("/") else None
        if choices is None:
            return path_completions(word)
        start = clean_path(word)
        return [
            f"{word}{_escape(name[len(start) :])}" for name in sorted(choices()) if name.startswith(start)
        ]


def last_word(line: str) -> str:
    """The word at the end of a line, as it is typed: with its quote and its backslashes."""
    start, quote, i = 0, "", 0
    while i < len(line):
        c = line[i]
        if c == "\\" and quote != "'":
            i += 1
        elif quote:
            quote = "" if c == quote else quote
        elif c in " \t\n":
            start = i + 1
        elif c in "'\"" and i == start:
            quote = c
        i += 1
    return line[start:]


def path_completions(word: str) -> list[str]:
    """The paths that a word could become; what is typed stays as it is, the rest is quoted as the word is.

    Names with control characters are left out: they would steer the terminal.
    """
    quote = word[:1] if word[:1] in "'\"" else ""
    plain = word[1:] if quote == "'" else re.sub(r"\\(.)", r"\1", word[len(quote) :], flags=re.S)
    folder, _, stem = plain.rpartition("/")
    root = Path(f"{folder}/" if "/" in plain else ".").expanduser()
    try:
        entries = sorted(root.iterdir())
    except (OSError, RuntimeError):  # no such folder, or ~ of a user unknown
        return []
    found = []
    for entry in entries:
        name = entry.name
        is_hidden = name.startswith(".") and not stem.startswith(".")
        if not name.startswith(stem) or is_hidden or _CONTROL.search(name):
            continue
        rest = name[len(stem) :]
        end = "/" if entry.is_dir() else quote
        found.append(f"{word}{rest if quote else _escape(rest)}{end}")
    return found


def _escape(path: str) -> str:
    return "".join(f"\\{c}" if c in _ESCAPED else c for c in path)
