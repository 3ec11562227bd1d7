"""Messages to the chunks of a prompt: ChatML, as Qwen2-VL's Instruct models publish it.

    <|im_start|>system
    You are a helpful assistant.<|im_end|>
    <|im_start|>user
    <|vision_start|>[picture]<|vision_end|>What is this?<|im_end|>
    <|im_start|>assistant

The template is written out here rather than run through a template engine, because text must stay text:
control tokens are put in by id, and whatever a user types, `<|im_end|>` included, is tokenized as plain
characters. Text between two control tokens is tokenized as one piece, as the published tokenizer does it.

The base checkpoint's own template has no roles; it gets the same ChatML.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol, TypeAlias
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from qvl.runtime.errors import PromptError

Message: TypeAlias = Mapping[str, Any]
VisionKind: TypeAlias = Literal["image", "video"]
Replies: TypeAlias = Callable[[str], Sequence[int] | None]

DEFAULT_SYSTEM: Final = "You are a helpful assistant."
ROLES: Final = ("system", "user", "assistant")
# What a model marks places with in its replies; in an assistant's turn they are tokens again.
GROUNDING: Final = re.compile(r"(<\|(?:object_ref|box|quad)_(?:start|end)\|>)")
OPTIONS: Final = {
    "image": ("min_pixels", "max_pixels"),
    "video": ("fps", "min_frames", "max_frames", "min_pixels", "max_pixels", "total_pixels", "source_fps"),
}
_LABELS: Final = {"image": "Picture", "video": "Video"}  # the template's add_vision_id
_SYSTEM_IN_TEMPLATE: Final = re.compile(r"<\|im_start\|>system(?:\n|\\n)([^{}]*?)<\|im_end\|>")


@dataclass(frozen=True)
class TextChunk:
    """Tokens, control tokens included."""

    tokens: tuple[int, ...]


@dataclass(frozen=True)
class VisionChunk:
    """A picture or a video, between `<|vision_start|>` and `<|vision_end|>`.

    Attributes:
        source: what the message gave: a path, bytes, a PIL image, an array; for videos see `vision.video`.
        options: how to look at it, as the message gave it beside the source ("max_pixels", "fps", …).
    """

    kind: VisionKind
    source: Any
    options: tuple[tuple[str, float], ...] = ()


Chunk: TypeAlias = TextChunk | VisionChunk


class Tokenizer(Protocol):
    """What a prompt needs of a vocabulary (`qvl.runtime.llama.vocab.Vocab`)."""

    def tokenize(self, text: str) -> list[int]:
        """Tokens of plain text."""

    def control(self, name: str) -> int:
        """Id of a control token."""


class ChatTemplate:
    """Turns messages into chunks.

    Attributes:
        default_system: the system prompt of a conversation that does not begin with one; None for none.
    """

    def __init__(self, tokenizer: Tokenizer, template: str | None = None) -> None:
        """template: `tokenizer.chat_template` of the file, from which the default system prompt is read."""
        self._tokenizer = tokenizer
        self.default_system = default_system(template)

    def render(
        self,
        messages: Sequence[Message],
        *,
        complete: bool = True,
        number_images: bool = False,
        replies: Replies | None = None,
    ) -> list[Chunk]:
        """The prompt of a conversation.

        Args:
            messages: `{"role", "content"}`; content is a string or a list of `{"type": "text", "text"}`,
                `{"type": "image", "image"}`, `{"type": "video", "video"}`, kept in order. OpenAI's
                `image_url` with a data: or file: URL is understood as well. Beside "image" may stand
                min_pixels and max_pixels, beside "video" the fields of `VideoOptions`.
            complete: end with the header of the assistant's reply. False leaves the last message open,
                for reading ahead what is known of it.
            number_images: write "Picture 1: " and "Video 1: " before each.
            replies: gives the tokens a model sampled for a reply's text, so that they are kept as they are.

        Raises:
            PromptError: messages of another shape.
        """
        turns = [_turn(i, message) for i, message in enumerate(_nonempty(messages))]
        writer = _Writer(self._tokenizer)
        if turns[0].role != "system" and self.default_system is not None:
            writer.open_turn("system")
            writer.text(self.default_system)
            writer.close_turn()
        counts = dict.fromkeys(_LABELS, 0)
        for turn in turns:
            writer.open_turn(turn.role)
            for part in turn.parts:
                if isinstance(part, VisionChunk):
                    counts[part.kind] += 1
                    if number_images:
                        writer.text(f"{_LABELS[part.kind]} {counts[part.kind]}: ")
                    writer.vision(part)
                elif turn.role == "assistant":
                    writer.reply(part, replies)
                else:
                    writer.text(part)
            if turn is not turns[-1] or complete:
                writer.close_turn()
        if complete:
            writer.open_turn("assistant")
        return writer.finish()


def default_system(template: str | None) -> str | None:
    """The system prompt that a chat template puts in when a conversation has none."""
    if template is None or "<|im_start|>" not in template:
        return DEFAULT_SYSTEM
    found = _SYSTEM_IN_TEMPLATE.search(template)
    return found[1] if found else None


class _Writer:
    """Collects text and control tokens; text is tokenized when something else follows it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._chunks: list[Chunk] = []
        self._tokens: list[int] = []
        self._text: list[str] = []

    def open_turn(self, role: str) -> None:
        self.control("<|im_start|>")
        self.text(role + "\n")

    def close_turn(self) -> None:
        self.control("<|im_end|>")
        self.text("\n")

    def text(self, text: str) -> None:
        self._text.append(text)

    def control(self, name: str) -> None:
        self._flush_text()
        self._tokens.append(self._tokenizer.control(name))

    def reply(self, text: str, replies: Replies | None) -> None:
        sampled = replies(text) if replies else None
        if sampled is not None:
            self._flush_text()
            self._tokens.extend(sampled)
            return
        for i, piece in enumerate(GROUNDING.split(text)):
            if i % 2:
                self.control(piece)
            else:
                self.text(piece)

    def vision(self, chunk: VisionChunk) -> None:
        self.control("<|vision_start|>")
        self._flush_tokens()
        self._chunks.append(chunk)
        self.control("<|vision_end|>")

    def finish(self) -> list[Chunk]:
        self._flush_text()
        self._flush_tokens()
        return self._chunks

    def _flush_text(self) -> None:
        self._tokens.extend(self._tokenizer.tokenize("".join(self._text)))
        self._text.clear()

    def _flush_tokens(self) -> None:
        if self._tokens:
            self._chunks.append(TextChunk(tuple(self._tokens)))
            self._tokens.clear()


@dataclass(frozen=True)
class _Turn:
    role: str
    parts: tuple[str | VisionChunk, ...]


def _nonempty(messages: Sequence[Message]) -> Sequence[Message]:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise PromptError(
            f"messages are {type(messages).__name__} {messages!r:.80}, expected a list with at least one",
            hint='for example [{"role": "user", "content": "Hello"}]',
        )
    return messages


def _turn(i: int, message: Message) -> _Turn:
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise PromptError(f"message {i} is {message!r:.80}, expected role and content")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise PromptError(f"message {i} has role {role!r}, expected one of {', '.join(ROLES)}")
    if isinstance(content, str):
        return _Turn(role, (content,))
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise PromptError(f"message {i}: content is {type(content).__name__}, expected a string or a list")
    return _Turn(role, tuple(_parts(i, content)))


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
        elif kind == "image_url" and part.get("image_url") is not None:
            url = part["image_url"]
            yield VisionChunk("image", _local(where, url["url"] if isinstance(url, Mapping) else url))
        else:
            raise PromptError(
                f"{where} is {part!r:.80}, expected text, image or video",
                hint='for example {"type": "image", "image": "photo.jpg"}',
            )


def _options(where: str, kind: str, part: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    given = {name: value for name, value in part.items() if name not in ("type", kind)}
    for name, value in given.items():
        if name not in OPTIONS[kind]:
            known = ", ".join(OPTIONS[kind])
            raise PromptError(f"{where}: {name!r} beside {kind!r}, expected nothing or {known}")
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise PromptError(f"{where}: {name} is {value!r:.80}, expected a number")
    return tuple(sorted(given.items()))


def _local(where: str, source: Any) -> Any:
    """A source with its URL resolved; paths, bytes, images and arrays stay as they are."""
    if not isinstance(source, str):
        return source
    if source.startswith("file:"):
        return url2pathname(urlsplit(source).path)
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
    except binascii.Error as e:
        raise PromptError(f"{where}: a data: URL whose base64 is damaged: {e}") from e
