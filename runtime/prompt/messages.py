"""Messages in the OpenAI and Hugging Face shape, checked and split into text and vision parts."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from qvl.runtime.errors import PromptError, check_number, shown

Message: TypeAlias = Mapping[str, Any]


VisionKind: TypeAlias = Literal["image", "video"]


ROLES: Final = ("system", "user", "assistant", "tool")
_EXTRA: Final = ("tool_calls", "tool_call_id", "name", "reasoning_content")  # for the chat template


OPTIONS: Final = {
    "image": ("min_pixels", "max_pixels"),
    "video": ("fps", "min_frames", "max_frames", "min_pixels", "max_pixels", "total_pixels", "source_fps"),
}


_LARGEST: Final = 10**12  # of a number beside a source; far beyond every bound in use


@dataclass(frozen=True)
class VisionChunk:
    """A picture or a video, between `<|vision_start|>` and `<|vision_end|>`.

    Attributes:
        source: what the message gave: a path, bytes, a PIL image, an array; for videos see `vision.video`.
        options: its bounds and sampling, as the message gave them beside the source ("max_pixels", "fps", …).
    """

    kind: VisionKind
    source: Any
    options: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Turn:
    """A message, checked.

    Attributes:
        parts: its text, pictures and videos.
        message: as a chat template takes it, sources left out.
    """

    role: str
    parts: tuple[str | VisionChunk, ...]
    message: Mapping[str, Any]

    @classmethod
    def of(cls, role: str, content: str | Sequence[str | VisionChunk], **extra: Any) -> Turn:
        """A message of text, pictures and videos; `extra` is for the chat template."""
        if isinstance(content, str):
            return cls(role, (content,), {"role": role, "content": content, **extra})
        parts = tuple(content)
        return cls(role, parts, {"role": role, "content": [_as_template(part) for part in parts], **extra})


def nonempty(messages: Sequence[Message | Turn]) -> Sequence[Message | Turn]:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise PromptError(
            f"messages are {type(messages).__name__} {shown(messages)}, expected a list with at least one",
            hint='for example [{"role": "user", "content": "Hello"}]',
        )
    return messages


def parse_turn(i: int, message: Message | Turn) -> Turn:
    """The i-th message of a conversation, checked.

    Raises:
        PromptError: it has another shape.
    """
    if isinstance(message, Turn):
        return message
    called = isinstance(message, Mapping) and message.get("tool_calls")
    if not isinstance(message, Mapping) or "role" not in message or not (called or "content" in message):
        raise PromptError(f"message {i} is {shown(message)}, expected role and content")
    role, content = message["role"], message.get("content")
    if role not in ROLES:
        raise PromptError(f"message {i} has role {shown(role)}, expected one of {', '.join(ROLES)}")
    extra = {key: _plain_json(i, key, message[key]) for key in _EXTRA if message.get(key) is not None}
    if isinstance(content, str) or (content is None and called):
        return Turn.of(role, content or "", **extra)
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise PromptError(f"message {i}: content is {type(content).__name__}, expected a string or a list")
    return Turn.of(role, tuple(_parts(i, content)), **extra)


def question_of(messages: Sequence[Message]) -> str:
    """The text of the last user's message, pictures left out."""
    i = next((i for i in reversed(range(len(messages))) if messages[i].get("role") == "user"), None)
    parts = () if i is None else parse_turn(i, messages[i]).parts
    return "\n".join(part for part in parts if isinstance(part, str))


def _as_template(part: str | VisionChunk) -> dict[str, str]:
    return {"type": "text", "text": part} if isinstance(part, str) else {"type": part.kind, part.kind: ""}


def _plain_json(i: int, key: str, value: Any) -> Any:
    """The value itself, if JSON can hold it."""
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError) as e:
        raise PromptError(f"message {i}: {key} is no JSON: {e}") from e
    return value


def _parts(i: int, content: Sequence[Any]) -> Iterator[str | VisionChunk]:
    for j, part in enumerate(content):
        where = f"message {i}, part {j}"
        if isinstance(part, str):
            yield part
            continue
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            yield part["text"]
        elif kind in ("image", "video") and part.get(kind) is not None:
            yield VisionChunk(kind, _local(where, part[kind]), _options(where, kind, part))
        elif kind == "image_url" and (url := _url(part)) is not None:
            yield VisionChunk("image", _local(where, url))
        else:
            raise PromptError(
                f"{where} is {shown(part)}, expected text, image or video",
                hint='for example {"type": "image", "image": "photo.jpg"}',
            )


def _options(where: str, kind: str, part: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    given = {name: value for name, value in part.items() if name not in ("type", kind)}
    for name, value in given.items():
        if name not in OPTIONS[kind]:
            known = ", ".join(OPTIONS[kind])
            raise PromptError(f"{where}: {name!r} beside {kind!r}, expected nothing or {known}")
        check_number(f"{where}: {name}", value, 0, _LARGEST, error=PromptError)
    return tuple(sorted(given.items()))


def _url(part: Mapping[str, Any]) -> Any:
    """OpenAI's {"url": …}, or the address itself."""
    url = part.get("image_url")
    return url.get("url") if isinstance(url, Mapping) else url


def _local(where: str, source: Any) -> Any:
    """A source with its URL resolved; paths, bytes, images and arrays stay as they are."""
    if not isinstance(source, str):
        return source
    if "\0" in source:
        raise PromptError(f"{where} has a NUL character in {shown(source)}")
    if source.startswith("file:"):
        try:
            return url2pathname(urlsplit(source).path)
        except ValueError as e:
            raise PromptError(f"{where} is {shown(source)}, no file: URL: {e}") from e
    if source.startswith(("http://", "https://")):
        raise PromptError(
            f"{where} is a web address, {source:.60}",
            hint="download the picture first: qvl reads local files",
        )
    if not source.startswith("data:"):
        return source
    head, _, body = source.partition(",")
    try:
        return base64.b64decode(body, validate=True) if head.endswith(";base64") else unquote(body).encode()
    except ValueError as e:  # binascii.Error is one
        raise PromptError(f"{where}: a data: URL whose base64 is damaged: {e}") from e
