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

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

from qvl.runtime.prompt.messages import Message, VisionChunk, nonempty, parse_turn

Replies: TypeAlias = Callable[[str], Sequence[int] | None]

DEFAULT_SYSTEM: Final = "You are a helpful assistant."
# What a model marks places with in its replies; in an assistant's turn they are tokens again.
GROUNDING: Final = re.compile(r"(<\|(?:object_ref|box|quad)_(?:start|end)\|>)")
_LABELS: Final = {"image": "Picture", "video": "Video"}  # the template's add_vision_id
_SYSTEM_IN_TEMPLATE: Final = re.compile(r"<\|im_start\|>system(?:\n|\\n)([^{}]*?)<\|im_end\|>")


@dataclass(frozen=True)
class TextChunk:
    """Tokens, control tokens included."""

    tokens: tuple[int, ...]


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
        turns = [parse_turn(i, message) for i, message in enumerate(nonempty(messages))]
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
