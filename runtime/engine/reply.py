"""Replies: a stream of pieces, and the finished reply with its usage and timings."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qvl.runtime.errors import Cancelled, QvlError, Unpicklable, shown

FinishReason: TypeAlias = Literal["stop", "length", "cancelled"]
StageProgress: TypeAlias = Callable[[str, float], None]
"""Called with a stage ("frames" of a video read, "encode", "prefill") and the fraction of it that is done."""


@dataclass(frozen=True)
class TokenLogprob:
    """Log probability of a token, before any sampler changed it.

    Attributes:
        top: the likeliest tokens with their log probabilities, best first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()

    @classmethod
    def of(cls, logits: NDArray[np.float32], token: int, n_top: int) -> TokenLogprob:
        """Compute it from the logits that the token was sampled from, float32 [n_vocab]."""
        logprobs = logits.astype(np.float64) - float(logits.max())
        logprobs -= np.log(np.exp(logprobs).sum())
        best = np.argpartition(-logprobs, n_top)[:n_top]
        top = sorted(((int(i), float(logprobs[i])) for i in best), key=lambda entry: -entry[1])
        return cls(token, float(logprobs[token]), tuple(top))


@dataclass(frozen=True)
class Piece:
    """A part of a reply: text, and the tokens it came from.

    A token's text can be held back until its last byte, or until it is clear that no stop string begins
    with it; then the next piece has several tokens.

    Attributes:
        text: for people, see `Reply.text`; empty while the model writes the coordinates of a box.
        logprobs: of the tokens, where they were asked for.
        raw: the text as the model wrote it.
        boxes: those that this piece completes, as in `Reply.boxes`.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    raw: str = ""
    boxes: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Usage:
    """Tokens counted in KV cells.

    Attributes:
        prompt_tokens: the whole prompt, pictures included.
        image_tokens: those of pictures and videos.
        cached_tokens: those the KV cache held already.
        completion_tokens: sampled, the end token not counted.
        images_encoded: pictures and videos that went through the encoder for this reply.
        tokens_by_image: of each picture and video that is read, in order.
    """

    prompt_tokens: int = 0
    image_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    images_encoded: int = 0
    tokens_by_image: tuple[int, ...] = ()

    @property
    def prefilled_tokens(self) -> int:
        """Prompt tokens that went through the decoder."""
        return self.prompt_tokens - self.cached_tokens


@dataclass(frozen=True)
class Timings:
    """Seconds spent; waiting for the reader of the stream does not count.

    Attributes:
        encode_seconds: reading, resizing and encoding pictures.
        prefill_seconds: prompt through the decoder.
        generate_seconds: the reply, its first token included.
    """

    encode_seconds: float = 0.0
    prefill_seconds: float = 0.0
    generate_seconds: float = 0.0

    @property
    def first_token_seconds(self) -> float:
        """Seconds from the question to the first token, without sampling it."""
        return self.encode_seconds + self.prefill_seconds


@dataclass(frozen=True)
class Reply:
    """A finished reply.

    Attributes:
        text: for people: where the model marked a box, its coordinates in pixels of the picture.
        tokens: as sampled, without the end token.
        finish_reason: "stop" (the model or a stop string ended it), "length" (max_tokens, or a full
            context) or "cancelled".
        seed: of the random numbers.
        dropped_messages: how many of the oldest messages had to be left out of the context.
        raw: the text as the model wrote it, markup of boxes included.
        boxes: {"label": …, "box": [left, top, right, bottom], "picture": number} each, or "point": [x, y], or
            "quad": four of them; in pixels of the picture as it is shown, pictures counted from 1. Where the
            prompt has no picture: in thousandths of the width and height, without "picture".
        problems: mistakes of the model in marking boxes, in words.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage = field(default_factory=Usage)
    timings: Timings = field(default_factory=Timings)
    seed: int | None = None
    dropped_messages: int = 0
    raw: str = ""
    boxes: tuple[Mapping[str, Any], ...] = ()
    problems: tuple[str, ...] = ()

    def __repr__(self) -> str:
        n = len(self.boxes)
        boxes = f", {n} box{'es'[: 2 * (n > 1)]}" if n else ""
        return f"Reply({shown(self.text)}, {len(self.tokens)} tokens, {self.finish_reason!r}{boxes})"

    @property
    def message(self) -> dict[str, Any]:
        """The reply as a message of the conversation, in the model's own words (`raw`)."""
        return {"role": "assistant", "content": self.raw}

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second through the decoder; 0 when nothing was prefilled."""
        return (
            self.usage.prefilled_tokens / self.timings.prefill_seconds
            if self.timings.prefill_seconds
            else 0.0
        )

    @property
    def generate_rate(self) -> float:
        """Reply tokens a second; 0 when there are none."""
        return (
            self.usage.completion_tokens / self.timings.generate_seconds
            if self.timings.generate_seconds
            else 0.0
        )


class Unfinished(Protocol):
    """A reply while it is made, as a stream sees it."""

    @property
    def dropped_messages(self) -> int: ...

    def cancel(self) -> None:
        """End it at the next step."""

    def reply(self, reason: FinishReason) -> Reply:
        """The reply as it stands."""


class Stream(Unpicklable, Iterator[Piece]):
    """A reply being made. Iterate for the pieces; work is done only while somebody asks for one.

    A KeyboardInterrupt goes through to the caller and ends the reply there; `result` then has what came
    before it, and the conversation stays usable.
    """

    def __init__(self, steps: Generator[Piece, None, FinishReason], draft: Unfinished) -> None:
        """steps: makes the pieces, keeps the draft, and returns why it ended."""
        self._steps = steps
        self._draft = draft
        self._reply: Reply | None = None
        self._error: QvlError | None = None

    def __repr__(self) -> str:
        state = "failed" if self._error is not None else "going on" if self._reply is None else self._reply
        return f"Stream({state})"

    def __next__(self) -> Piece:
        if self._error is not None:
            raise self._error
        if self._reply is not None:
            raise StopIteration
        try:
            return next(self._steps)
        except StopIteration as end:
            self._reply = self._draft.reply(end.value)
        except Cancelled:
            self._reply = self._draft.reply("cancelled")
        except QvlError as e:
            self._error = e
            raise
        except BaseException:
            self._reply = self._draft.reply("cancelled")
            raise
        raise StopIteration

    @property
    def dropped_messages(self) -> int:
        """Number of the oldest messages that are left out; known once there is a piece."""
        return self._draft.dropped_messages

    def cancel(self) -> None:
        """End the reply here; any thread may call it. A finished reply stays as it is."""
        self._draft.cancel()

    def result(self) -> Reply:
        """The finished reply; waits for its end.

        Raises:
            QvlError: what stopped it.
        """
        for _ in self:
            pass
        assert self._reply is not None
        return self._reply
