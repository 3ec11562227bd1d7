"""Conversations on an engine: messages to units, what fits the context, and the tokens of earlier replies.

The messages of a turn are rendered whole; the engine compares them with what its slots hold and reads the
rest. So a new turn costs its own tokens, and editing or undoing one is nothing but sending other messages.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

from qvl.runtime.engine.engine import Engine
from qvl.runtime.engine.fit import Fitter
from qvl.runtime.engine.reply import FinishReason, Piece, Progress, Reply, Stream, Timings, Usage
from qvl.runtime.engine.request import Job, Request
from qvl.runtime.engine.store import EmbeddingStore
from qvl.runtime.engine.text import StopStrings
from qvl.runtime.engine.units import Unit, VisionUnit, n_vision_cells
from qvl.runtime.errors import Cancelled, InputError, check_whole
from qvl.runtime.grammar.schema import schema_to_grammar
from qvl.runtime.llama.context import Context
from qvl.runtime.llama.sampler import Sampler, Sampling
from qvl.runtime.prompt.chatml import ChatTemplate
from qvl.runtime.prompt.messages import Message

MAX_TOKENS: Final = 1024
_MAX_REPLIES: Final = 256


class Session:
    """A conversation, or any sequence of prompts that share beginnings.

    Safe for threads: where the context has one slot their requests queue, with several they run together.
    A stream that a thread has not read to its end ends when the same thread reads another.

    Attributes:
        engine: the slots of the context.
        on_drop: called with the number of messages when the oldest had to go because the context is full.
    """

    def __init__(
        self,
        context: Context,
        store: EmbeddingStore,
        template: ChatTemplate,
        defaults: Sampling | None = None,
        on_drop: Callable[[int], None] | None = None,
    ) -> None:
        """The context belongs to the session from now on; each of its sequences is a slot."""
        self.engine = Engine(context, store)
        self.on_drop = on_drop
        self._vocab = context.model.vocab
        self._store = store
        self._template = template
        self._defaults = defaults or Sampling()
        self._fitter = Fitter(context.n_ctx)
        self._lock = threading.RLock()  # of the fitter, the replies and the drafts
        self._replies: OrderedDict[str, tuple[int, ...]] = OrderedDict()
        self._drafts: dict[int, _Draft] = {}  # by thread

    @property
    def n_ctx(self) -> int:
        """KV cells of the context."""
        return self.engine.n_ctx

    @property
    def n_cached(self) -> int:
        """KV cells in use."""
        return self.engine.n_cached

    def prefill(
        self,
        messages: Sequence[Message],
        *,
        cancel: threading.Event | None = None,
        number_images: bool = False,
        progress: Progress | None = None,
    ) -> int:
        """Read ahead: encode and prefill what is known of the next prompt, its last message left open.

        Args:
            cancel: set it to stop; what was done until then is kept.

        Returns:
            KV cells prefilled.

        Raises:
            Cancelled: it was stopped.
            PromptError, ImageError, ContextFullError: as `generate`.
        """
        draft = _Draft(cancelled=cancel or threading.Event())
        with self._current(draft):
            reserve = min(MAX_TOKENS, self.n_ctx // 8)
            units = self._read(messages, draft, reserve, progress, number_images, complete=False)
            job = draft.job = self.engine.submit(Request(units), draft.cancelled)
            for _ in self._pieces(job, progress):
                pass
        if job.error is not None:
            raise job.error
        if job.read_tokens < job.prompt_tokens - job.cached_tokens:
            raise Cancelled("stopped while reading the prompt")
        return job.prompt_tokens - job.cached_tokens

    def generate(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int = MAX_TOKENS,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repeat_penalty: float | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
        grammar: str | None = None,
        schema: Mapping[str, Any] | str | None = None,
        number_images: bool = False,
        progress: Progress | None = None,
    ) -> Stream:
        """Reply to a conversation.

        What concerns sampling is the model's own (`general.sampling.*`) where it is None, and greedy where
        the model says nothing.

        Args:
            messages: see `ChatTemplate.render`.
            max_tokens: longest reply.
            stop: strings that end the reply, and are not part of it.
            grammar: GBNF that the reply must fit.
            schema: JSON schema that the reply must fit.
            number_images: put "Picture 1: " before pictures.
            progress: called while frames are read, pictures encoded, and the prompt prefilled.

        Raises:
            InputError: a parameter out of bounds, a schema or grammar that cannot be used.
            PromptError, ImageError, ContextFullError: raised by the stream, when the prompt is read.
        """
        check_whole("max_tokens", max_tokens, 1)
        if schema is not None and grammar is not None:
            raise InputError("a grammar and a schema, expected one of them")
        sampling = self._defaults.override(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            repeat_penalty=repeat_penalty, seed=seed,
        )  # fmt: skip
        if schema is not None:
            grammar = schema_to_grammar(schema)
        StopStrings(stop)  # raises for what cannot be used
        sampler = Sampler(self._vocab, sampling, grammar)
        draft = _Draft(threading.Event(), sampler.seed)
        steps = self._steps(messages, draft, sampler, tuple(stop), max_tokens, number_images, progress)
        return Stream(steps, draft)

    def clear(self) -> None:
        """Forget the conversation. The embeddings of its pictures stay at hand."""
        with self._lock:
            for draft in self._drafts.values():
                draft.cancel()
            self._replies.clear()
            self._fitter.forget()
        self.engine.clear()

    def close(self) -> None:
        """Free the context; what is under way is called off. Doing it twice is harmless."""
        self.engine.close()

    # -- the reply

    def _steps(
        self,
        messages: Sequence[Message],
        draft: _Draft,
        sampler: Sampler,
        stop: tuple[str, ...],
        max_tokens: int,
        number_images: bool,
        progress: Progress | None,
    ) -> Generator[Piece, None, FinishReason]:
        with self._current(draft):
            reserve = min(max_tokens, self.n_ctx // 8)
            units = self._read(messages, draft, reserve, progress, number_images, complete=True)
            request = Request(units, (sampler,), max_tokens, stop)
            job = draft.job = self.engine.submit(request, draft.cancelled)
            try:
                yield from self._pieces(job, progress)
            finally:
                draft.cancel()  # where it has not ended, nobody reads it any more
                self._remember(job.samples[0].text, job.samples[0].tokens)
            if job.error is not None:
                raise job.error
            return job.samples[0].reason or "cancelled"

    def _pieces(self, job: Job, progress: Progress | None) -> Iterator[Piece]:
        """Step the engine until the job is done."""
        while True:
            while job.samples and job.samples[0].pieces:
                yield job.samples[0].pieces.popleft()
            if job.done:
                return
            self.engine.turn(job)
            while progress is not None and job.progress:
                progress(*job.progress.popleft())

    @contextmanager
    def _current(self, draft: _Draft) -> Iterator[None]:
        """While the body runs, this is what the thread reads; what it has left unread ends."""
        thread = threading.get_ident()
        with self._lock:
            left = self._drafts.pop(thread, None)
            self._drafts[thread] = draft
        if left is not None:
            left.cancel()
        try:
            yield
        finally:
            with self._lock:
                if self._drafts.get(thread) is draft:
                    del self._drafts[thread]

    def _remember(self, text: str, tokens: Sequence[int]) -> None:
        """Keep the tokens of a reply, so that its text is not tokenized another way in the next prompt."""
        if tokens and self._vocab.detokenize(tokens) == text:
            with self._lock:
                self._replies[text] = tuple(tokens)
                self._replies.move_to_end(text)
                if len(self._replies) > _MAX_REPLIES:
                    self._replies.popitem(last=False)

    # -- the prompt

    def _read(
        self,
        messages: Sequence[Message],
        draft: _Draft,
        reserve: int,
        progress: Progress | None,
        number_images: bool,
        *,
        complete: bool,
    ) -> list[Unit]:
        """The units of a prompt, as many of its last messages as fit."""
        watch = _watch("frames", draft, progress)

        def units_of(some: Sequence[Message]) -> list[Unit]:
            return self._template.units(
                some,
                lambda chunk: self._store.place(chunk, watch),
                complete=complete,
                number_images=number_images,
                replies=self._replies.get,
            )

        started = time.perf_counter()
        with self._lock:
            fitted = self._fitter.fit(messages, units_of, reserve)
        draft.read_seconds += time.perf_counter() - started
        draft.dropped_messages = fitted.n_dropped
        if fitted.n_new and self.on_drop is not None:
            self.on_drop(fitted.n_dropped)
        return fitted.units


class _Draft:
    """A reply while it is made."""

    def __init__(self, cancelled: threading.Event, seed: int | None = None) -> None:
        self.cancelled = cancelled
        self.seed = seed
        self.dropped_messages = 0
        self.read_seconds = 0.0
        self.job: Job | None = None

    def cancel(self) -> None:
        """End it at the next step."""
        self.cancelled.set()

    def reply(self, reason: FinishReason) -> Reply:
        """The reply as it stands."""
        job = self.job
        if job is None:
            return Reply("", (), reason, seed=self.seed, dropped_messages=self.dropped_messages)
        pictures = [unit for unit in job.request.units if isinstance(unit, VisionUnit)]
        [sample] = job.samples
        return Reply(
            sample.text,
            tuple(sample.tokens),
            reason,
            Usage(
                job.prompt_tokens,
                n_vision_cells(pictures),
                job.cached_tokens,
                len(sample.tokens),
                job.images_encoded,
                tuple(unit.span.n_tokens for unit in pictures),
            ),
            Timings(self.read_seconds + job.encode_seconds, job.prefill_seconds, job.generate_seconds),
            self.seed,
            self.dropped_messages,
        )


def _watch(stage: str, draft: _Draft, progress: Progress | None) -> Callable[[float], bool]:
    """Reports a stage, and says whether to go on."""

    def watch(fraction: float) -> bool:
        if progress is not None:
            progress(stage, fraction)
        return not draft.cancelled.is_set()

    return watch
