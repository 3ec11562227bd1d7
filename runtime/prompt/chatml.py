"""Renders messages into the tokens and vision spans of a prompt, by the chat template in the model's file.

The template (Jinja) is rendered as transformers renders it, tools and thinking included. Control tokens are
those that it writes: what a user types stays text, `<|im_end|>` included. For that, what could be read as a
control token gets a mark before the template sees it, which is taken out again when the text is tokenized.
The tokens by which a model points at things (`markers`) are the exception: they are tokens in every text.

Text between two control tokens is tokenized as one piece, as the published tokenizer does it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeAlias, TypeVar

from qvl.runtime.errors import PromptError
from qvl.runtime.prompt.messages import Message, Turn, VisionChunk, nonempty, parse_turn
from qvl.runtime.prompt.positions import Span
from qvl.runtime.prompt.rules import PromptRules
from qvl.runtime.prompt.sandbox import ChatTemplateError, CompiledTemplate

LOGGER: Final = logging.getLogger("qvl.prompt")
Replies: TypeAlias = Callable[[str], Sequence[int] | None]
U = TypeVar("U")

_MARK, _LITERAL = "\ufdd0", "\ufdd1"  # noncharacters, which no text has for itself
_TURN: Final = re.compile(r"<\|im_start\|>assistant\n(.*?)<\|im_end\|>", re.DOTALL)


@dataclass(frozen=True)
class TextChunk:
    """Tokens, control tokens included."""

    tokens: tuple[int, ...]


Chunk: TypeAlias = TextChunk | VisionChunk


class Tokenizer(Protocol):
    """Vocabulary, as far as prompts need it (`qvl.runtime.llama.vocab.Vocab`)."""

    @property
    def controls(self) -> Sequence[str]:
        """Names of the control tokens."""

    def tokenize(self, text: str) -> list[int]:
        """Tokens of plain text."""

    def control(self, name: str) -> int:
        """Id of a control token."""


class ChatTemplate:
    """Turns messages into prompts."""

    def __init__(
        self, tokenizer: Tokenizer, template: str | None = None, rules: PromptRules | None = None
    ) -> None:
        """template: `tokenizer.chat_template` of the file; the family's stands in where it has no roles."""
        self.rules = rules or PromptRules()
        self._tokenizer = tokenizer
        self._own = CompiledTemplate(self.rules.template)
        self._template, self._source = self._own, self.rules.template
        if template is not None and ("<|im_start|>" in template or "<|im_start|>" not in self.rules.template):
            try:
                self._template, self._source = CompiledTemplate(template), template
            except ChatTemplateError as error:
                LOGGER.warning("the file's chat template cannot be used, the family's is: %s", error)
        held = [
            name for name in tokenizer.controls if name.startswith("<") and name not in self.rules.markers
        ]
        self._held = tuple(held)
        self._longest = max(map(len, held), default=0)
        known = [*held, *(name for name in self.rules.markers if name in tokenizer.controls)]
        self._controls = _any_of(known)
        self._places = _any_of(text for _, text in self.rules.placeholders)
        self._warned = self._replaced = False  # a warning is given once

    def units(
        self,
        messages: Sequence[Message | Turn],
        place: Callable[[VisionChunk], Sequence[str | U]],
        *,
        complete: bool = True,
        number_images: bool = False,
        replies: Replies | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool | None = None,
    ) -> list[int | U]:
        """The prompt of a conversation.

        Args:
            messages: `{"role", "content"}`; content is a string or a list of `{"type": "text", "text"}`,
                `{"type": "image", "image"}`, `{"type": "video", "video"}`, kept in order. OpenAI's
                `image_url` with a data: or file: URL is understood as well. Beside "image" may stand
                min_pixels and max_pixels, beside "video" the fields of `VideoOptions`. An assistant's
                message may have "tool_calls" and "reasoning_content", and "tool" is a role. A `Turn` is taken
                as it is.
            place: gives the layout of a picture or video: text in which control tokens stand by name, and
                units for its embeddings.
            complete: end with the header of the assistant's reply. False leaves the last message open, to
                prefill its known part.
            number_images: write "Picture 1: " and "Video 1: " before each.
            replies: gives the tokens a model sampled for a reply's text, so that they are kept as they are.
            tools: functions that the model may call, in OpenAI's shape.
            thinking: whether the model is to think first, where its template leaves the choice.

        Raises:
            PromptError: messages of another shape, or that the template refuses.
        """
        turns = [parse_turn(i, message) for i, message in enumerate(nonempty(messages))]
        if tools and "tools" not in self._source:
            raise PromptError("this model's chat template takes no tools")
        variables: dict[str, Any] = {
            "messages": [self._held_back(turn.message) for turn in turns],
            "add_generation_prompt": complete,
            "add_vision_id": number_images,
            "tools": self._held_back(list(tools)) if tools else None,
            "documents": None,
            "default_system": self.rules.default_system,
        }
        if thinking is not None:
            variables["enable_thinking"] = thinking
        visions = [part for turn in turns for part in turn.parts if isinstance(part, VisionChunk)]
        text = self._render(variables, visions)
        if not complete:
            text = text[: text.rfind("<|im_end|>")] if "<|im_end|>" in text else text
        units = [*self._tokens(self._placed(text, visions, place), replies)]
        if not self._warned:
            n = sum(getattr(getattr(unit, "span", None), "n_tokens", 1) for unit in units)
            self._warned = self.warn_beyond(n, "the prompt")
        return units

    def warn_beyond(self, n: int, what: str) -> bool:
        """Log a warning, and return True, if n tokens are more than `PromptRules.n_trained`."""
        trained = self.rules.n_trained
        if trained is None or n <= trained:
            return False
        LOGGER.warning(
            "%s has %d tokens, and this model was trained on %d; beyond them the published code changes "
            "the rotary base and scales queries, llama.cpp does not, and replies may get worse",
            what, n, trained,
        )  # fmt: skip
        return True

    def render(self, messages: Sequence[Message], **options: Any) -> list[Chunk]:
        """The prompt as tokens and the pictures and videos between them; options are those of `units`."""
        chunks: list[Chunk] = []
        tokens: list[int] = []
        for unit in self.units(messages, lambda chunk: [chunk], **options):
            if isinstance(unit, int):
                tokens.append(unit)
                continue
            chunks += [TextChunk(tuple(tokens)), unit] if tokens else [unit]
            tokens.clear()
        return [*chunks, TextChunk(tuple(tokens))] if tokens else chunks

    def n_cells(self, pieces: Sequence[str | Span]) -> int:
        """KV cells of what a layout (`PromptRules.layout`) makes of a picture or video."""
        units: Iterable[int | Span] = self._tokens(pieces, None)
        return sum(1 if isinstance(unit, int) else unit.n_tokens for unit in units)

    def _render(self, variables: dict[str, Any], visions: Sequence[VisionChunk]) -> str:
        """The template's text, with a placeholder for every picture and video."""
        counts = {kind: sum(chunk.kind == kind for chunk in visions) for kind in ("image", "video")}
        places = dict(self.rules.placeholders)
        for kind, count in counts.items():
            if count and kind not in places:
                raise PromptError(f"this model has not learned to see a {kind}")
        problem = ""
        for template in dict.fromkeys((self._template, self._own)):
            try:
                text = template.render(**variables)
            except ChatTemplateError as error:
                problem = str(error)
                continue
            if all(text.count(place) == counts[kind] for kind, place in places.items()):
                if problem and not self._replaced:
                    self._replaced = True
                    LOGGER.warning("the file's chat template cannot be used, the family's is: %s", problem)
                return text
            if any(place in self._source for place in places.values()):
                problem = "it does not show every picture"  # one without a place for any is for text alone
        raise PromptError(f"the chat template cannot be used: {problem or 'it does not show every picture'}")

    def _held_back(self, value: Any) -> Any:
        """A copy in which no string can be read as a control token, alone or joined to another."""
        if isinstance(value, str):
            text = value.replace(_MARK, _MARK + _LITERAL)
            return re.sub("<", lambda match: self._marked(text, match.start()), text)
        if isinstance(value, Mapping):
            return {self._held_back(key): self._held_back(item) for key, item in value.items()}
        return [self._held_back(item) for item in value] if isinstance(value, list | tuple) else value

    def _marked(self, text: str, at: int) -> str:
        rest = text[at : at + self._longest]
        at_end = at + self._longest > len(text)
        forged = any(rest.startswith(name) or (at_end and name.startswith(rest)) for name in self._held)
        return f"<{_MARK}" if forged else "<"

    def _placed(
        self, text: str, visions: Iterable[VisionChunk], place: Callable[[VisionChunk], Sequence[str | U]]
    ) -> list[str | U]:
        """The text with the layouts of pictures and videos in place of their placeholders."""
        queues = {kind: [chunk for chunk in visions if chunk.kind == kind] for kind in ("image", "video")}
        kinds = {written: kind for kind, written in self.rules.placeholders}
        parts: list[str | U] = []
        for i, piece in enumerate(self._places.split(text)):
            if i % 2:
                parts.extend(place(queues[kinds[piece]].pop(0)))
            else:
                parts.append(piece)
        return parts

    def _tokens(self, parts: Iterable[str | U], replies: Replies | None) -> Iterable[int | U]:
        text = ""
        for part in parts:
            if isinstance(part, str):
                text += part
                continue
            yield from self._text_tokens(text, replies)
            yield part
            text = ""
        yield from self._text_tokens(text, replies)

    def _text_tokens(self, text: str, replies: Replies | None) -> Iterable[int]:
        done = 0
        for turn in _TURN.finditer(text) if replies is not None else ():
            sampled = replies(_plain(turn[1])) if replies is not None else None
            if sampled is not None:
                yield from self._split(text[done : turn.start(1)])
                yield from sampled
                done = turn.end(1)
        yield from self._split(text[done:])

    def _split(self, text: str) -> Iterable[int]:
        for i, piece in enumerate(self._controls.split(text)):
            if i % 2:
                yield self._tokenizer.control(piece)
            else:
                yield from self._tokenizer.tokenize(_plain(piece))


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")


def _plain(text: str) -> str:
    """The text without the marks of `_held_back`."""
    return re.sub(f"{_MARK}({_LITERAL}?)", lambda match: _MARK if match[1] else "", text)
