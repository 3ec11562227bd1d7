"""Saved conversations: JSON that a person can read, edit and move."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from qvl.runtime.atomic import PRIVATE, write_error, write_whole
from qvl.runtime.errors import FormatError, InputError, OutputError, check_text, check_whole
from qvl.runtime.files import as_json, expanded, is_portable, is_there, open_file, parse_json, state_dir
from qvl.runtime.llama.sampler import Sampling
from qvl.runtime.prompt.messages import parse_turn

VERSION: Final = 1
LAST: Final = "last"


@dataclass(frozen=True)
class Saved:
    """Content of a session file.

    Attributes:
        messages: in the shape of OpenAI and HF, pictures by absolute path. A reply with boxes has its
            readable text as `content`, what the model wrote as `raw`, and `boxes` in pixels.
    """

    messages: list[dict[str, Any]]
    system: str | None = None
    model: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def session_path(name: str) -> Path:
    """Path of a session: a path as it is, a bare name in the state folder."""
    path = expanded(name)
    if path.name and not is_portable(path.name):
        raise InputError(f"{name!r} is not a valid file name on every system", hint="use letters and digits")
    if len(path.parts) == 1 and path.suffix != ".json":
        return state_dir() / "sessions" / f"{name}.json"
    return path


def save(name: str, saved: Saved) -> Path:
    """Write a session whole or not at all, readable by its owner alone.

    Raises:
        OutputError: it cannot be written there, or there is a file that is not a session.
    """
    path = session_path(name)
    if is_there(path) and not _is_session(path):
        raise OutputError(f"{path}: exists, and is not a session", hint="choose another name")
    content = {
        "qvl_session": VERSION,
        "saved": datetime.now().astimezone().isoformat(timespec="seconds"),
        "model": saved.model,
        "system": saved.system,
        "settings": saved.settings,
        "messages": saved.messages,
    }
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # conversations are private
        write_whole(path, f"{as_json(content, indent=2)}\n", mode=PRIVATE)
    except OSError as e:
        raise write_error(path, e, hint="/save PATH chooses another place") from e
    return path


def _is_session(path: Path) -> bool:
    try:
        with open_file(path) as file:
            content = parse_json(file.read())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "qvl_session" in content


def load(name: str) -> Saved:
    """Read a session, and see that the pictures it speaks of are still there.

    Raises:
        InputError: no such session, or pictures that are gone. FormatError: not a session file.
    """
    path = session_path(name)
    try:
        with open_file(path) as file:
            content = parse_json(file.read())
    except FileNotFoundError as e:
        raise InputError(f"{path}: no such session", hint=_known_hint()) from e
    except (OSError, ValueError) as e:
        raise FormatError(f"{path}: cannot be read as a session: {e}") from e
    saved = _checked(path, content)
    if gone := [part for part in _media(saved.messages) if not is_there(Path(part))]:
        hint = "put them back, or correct the paths in the session file"
        raise InputError(f"{path}: mentions missing files: {', '.join(gone)}", hint=hint)
    return saved


def _checked(path: Path, content: Any) -> Saved:
    if not isinstance(content, dict) or content.get("qvl_session") != VERSION:
        found = content.get("qvl_session") if isinstance(content, dict) else type(content).__name__
        raise FormatError(f'{path}: not a session: "qvl_session" is {found!r}, expected {VERSION}')
    messages = content.get("messages")
    if not isinstance(messages, list) or not all(_is_message(m) for m in messages):
        raise FormatError(f'{path}: "messages" must be a list of {{"role", "content"}}')
    system, settings = content.get("system"), content.get("settings", {})
    if not (system is None or isinstance(system, str)) or not isinstance(settings, dict):
        raise FormatError(f'{path}: "system" must be a text and "settings" an object')
    try:
        for i, message in enumerate(messages):
            parse_turn(i, message)
        known = {f.name for f in fields(Sampling)} & settings.keys()
        Sampling().override(**{name: settings[name] for name in known})
        check_whole("max_tokens", settings.get("max_tokens", 1), 1)
        check_text("system", system or "")
    except InputError as e:
        raise FormatError(f"{path}: {e.message}", hint=e.hint) from e
    return Saved(messages, system, content.get("model"), settings)


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or message.get("role") not in ("user", "assistant"):
        return False
    content = message.get("content")
    return isinstance(content, str) or (
        isinstance(content, list)
        and all(isinstance(p, dict) and isinstance(p.get(str(p.get("type"))), str) for p in content)
    )


def _media(messages: list[dict[str, Any]]) -> list[str]:
    parts = [part for m in messages if isinstance(m["content"], list) for part in m["content"]]
    return [part[part["type"]] for part in parts if part["type"] in ("image", "video")]


def _known_hint() -> str | None:
    names = session_names()
    return f"saved: {', '.join(names)}" if names else "nothing has been saved yet; /save NAME saves"


def session_names() -> list[str]:
    """The names of the sessions in the state folder."""
    return sorted(p.stem for p in (state_dir() / "sessions").glob("*.json"))
