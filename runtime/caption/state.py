"""The file beside the results: locked while a run is on, it keeps the settings and the pass of the run.

One JSON object a line, the last whole one valid, so that a crash while it is written does no harm.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from qvl.runtime.atomic import sync
from qvl.runtime.caption.settings import Settings
from qvl.runtime.errors import FormatError
from qvl.runtime.files import parse_json
from qvl.runtime.locks import Lock

Mode: TypeAlias = Literal["skip", "retry-errors", "overwrite", "append", "prepend"]
FORMAT: Final = 1


@dataclass(frozen=True)
class RunState:
    """Content of the file beside the results.

    Attributes:
        pass_mode: the pass that is under way, or None.
        pass_start: offset in the results at which it began.
        finishing: it is complete but for the rewriting.
        running: a run has it open, or died.
    """

    settings: Settings | None = None
    pass_mode: Mode | None = None
    pass_start: int = 0
    finishing: bool = False
    running: bool = False


class StateFile:
    """The file beside the results, locked for this run until `close`.

    Args:
        path: the file; made if it is not there.
        name: of the results, for messages.

    Raises:
        OutputError: another process has it, or its folder cannot be written. OSError: it cannot be opened.
    """

    def __init__(self, path: Path, name: Path) -> None:
        self.path = path
        self._lock = Lock(path, name)
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
            flags |= getattr(os, "O_BINARY", 0)
            self._handle = os.open(path, flags, 0o666)
        except BaseException:
            self._lock.release()
            raise

    def read(self) -> RunState:
        """The last state that was written whole.

        Raises:
            FormatError: another version of qvl wrote it, or something else.
        """
        found: Any = {}
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):  # torn by a crash: the line before it holds
                found = parse_json(line) or found
        hint = "remove it: the captions stay; only the record of their settings is lost"
        if not isinstance(found, dict):
            raise FormatError(f"{self.path}: a {type(found).__name__}, expected an object", hint=hint)
        if found.pop("qvl_caption", FORMAT) != FORMAT:
            raise FormatError(f"{self.path}: written by another version of qvl", hint="use that one")
        found.pop("pid", None)
        kinds = {"settings": dict | None, "pass_mode": str | None, "pass_start": int}
        for name, value in found.items():
            if name not in RunState.__dataclass_fields__ or not isinstance(value, kinds.get(name, bool)):
                raise FormatError(f"{self.path}: {name} is {value!r}, which qvl does not write", hint=hint)
        return RunState(**found)

    def write(self, state: RunState) -> None:
        """Add a state, durably. Raises OSError."""
        line = json.dumps({"qvl_caption": FORMAT, "pid": os.getpid(), **asdict(state)}, ensure_ascii=False)
        os.write(self._handle, f"\n{line}\n".encode())  # the line before may be torn
        sync(self._handle)

    def close(self) -> None:
        """Let others in."""
        os.close(self._handle)
        self._lock.release()
