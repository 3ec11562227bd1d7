"""Requests to the engine, and the jobs and samples that come of them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from qvl.runtime.engine.reply import FinishReason, Piece, TokenLogprob
from qvl.runtime.engine.text import ReplyText, StopStrings
from qvl.runtime.engine.units import Unit, VisionUnit, n_cells
from qvl.runtime.llama.sampler import Sampler
from qvl.runtime.llama.vocab import Vocab


@dataclass(frozen=True)
class Request:
    """A prompt, and the options of its replies.

    Attributes:
        units: the prompt.
        samplers: one for each reply; the engine closes them. Without any the prompt is only read.
        max_tokens: of each reply.
        stop: strings that end a reply and are not part of it.
        logprobs: how many of the likeliest tokens to report beside each one sampled; None reports nothing.
        keep: units of the prompt that the cache keeps at the end; None keeps all, the reply included.
    """

    units: Sequence[Unit]
    samplers: tuple[Sampler, ...] = ()
    max_tokens: int = 1
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    keep: int | None = None


class Sample:
    """One reply to a request, growing.

    Attributes:
        pieces: of its text, for the reader to take away.
        logprobs: of its tokens, where they were asked for.
        reason: why it ended; None while it goes on.
    """

    def __init__(self, sampler: Sampler, vocab: Vocab, stop: Sequence[str]) -> None:
        self.sampler = sampler
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.pieces: deque[Piece] = deque()
        self.reason: FinishReason | None = None
        self._text = ReplyText(vocab.decoder(), StopStrings(stop))
        self._reported = 0

    @property
    def text(self) -> str:
        """The text so far, without an end that could still become a stop string."""
        return self._text.text

    def add(self, token: int, logprob: TokenLogprob | None) -> bool:
        """Add a token; True when a stop string has ended the text."""
        self.tokens.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        self._put(self._text.feed(token))
        return self._text.cut

    def finish(self, reason: FinishReason) -> None:
        """End it."""
        self.reason = reason
        self._put(self._text.finish())
        self.sampler.close()

    def _put(self, text: str) -> None:
        if text:
            part = slice(self._reported, len(self.tokens))
            self._reported = len(self.tokens)
            self.pieces.append(Piece(text, tuple(self.tokens[part]), tuple(self.logprobs[part]), raw=text))


@dataclass(eq=False)
class Job:
    """A request under way.

    Attributes:
        cancelled: set it, from any thread, to end the job.
        done: whether it has ended; `error` is what stopped it, if anything did.
        cached_tokens: KV cells of the prompt that were there already.
        images_encoded: pictures and videos that went through the encoder for it.
        progress: stages and the fraction done of each, the last few; see `StageProgress`.
        encode_seconds, prefill_seconds, generate_seconds: as in `Timings`.
    """

    request: Request
    samples: tuple[Sample, ...]
    cancelled: threading.Event
    prompt_tokens: int = 0
    cached_tokens: int = 0
    read_tokens: int = 0
    images_encoded: int = 0
    progress: deque[tuple[str, float]] = field(default_factory=lambda: deque(maxlen=16))
    encode_seconds: float = 0.0
    prefill_seconds: float = 0.0
    generate_seconds: float = 0.0
    started: bool = False
    done: bool = False
    error: Exception | None = None
    pictures: frozenset[str] = field(default_factory=frozenset)

    @classmethod
    def of(cls, request: Request, vocab: Vocab, cancelled: threading.Event | None = None) -> Job:
        """The job of a request; the engine's business."""
        samples = tuple(Sample(sampler, vocab, request.stop) for sampler in request.samplers)
        keys = frozenset(unit.key for unit in request.units if isinstance(unit, VisionUnit))
        return cls(request, samples, cancelled or threading.Event(), n_cells(request.units), pictures=keys)

    @property
    def ready(self) -> bool:
        """True if there is a piece to take, or no more will come."""
        return self.done or any(sample.pieces for sample in self.samples)

    def cancel(self) -> None:
        """End it at the next step; any thread may ask. What has ended stays as it is."""
        self.cancelled.set()

    def end(self, reason: FinishReason, error: Exception | None = None) -> None:
        """Finish all samples that go on; the engine's business."""
        for sample in self.samples:
            if sample.reason is None:
                sample.finish(reason)
        self.error = error
        self.done = True
