"""Conversations on an engine: messages to units that fit the context, with the tokens of earlier replies.

The messages of a turn are rendered whole; the engine compares them with what its slots hold and reads the
rest. So a new turn costs its own tokens, and editing or undoing one means to send other messages.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, Final, Unpack

from qvl.runtime.engine.draft import Draft
from qvl.runtime.engine.engine import Engine
from qvl.runtime.engine.options import MAX_TOKENS, ReplyOptions, explicit, with_defaults
from qvl.runtime.engine.reading import Reader
from qvl.runtime.engine.reply import FinishReason, Piece, StageProgress, Stream
from qvl.runtime.engine.request import Job, Request
from qvl.runtime.engine.store import EmbeddingStore
from qvl.runtime.engine.text import StopStrings
from qvl.runtime.engine.units import VisionUnit
from qvl.runtime.errors import Cancelled, InputError, Unpicklable, check_whole
from qvl.runtime.grammar.schema import schema_to_grammar
from qvl.runtime.grounding.box import Event
from qvl.runtime.grounding.readable import ReadableReply
from qvl.runtime.llama.context import Context
from qvl.runtime.llama.sampler import Sampler, Sampling
from qvl.runtime.prompt.chatml import ChatTemplate
from qvl.runtime.prompt.messages import Message, question_of

_SAMPLING: Final = frozenset(field.name for field in fields(Sampling))


class Session(Unpicklable):
    """A conversation, or any sequence of prompts that share beginnings.

    Safe for threads: where the context has one slot their requests queue, with several they run together.
    A stream that a thread has not read to its end ends when the same thread reads another.

    Attributes:
        engine: the slots of the context.
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
        self._vocab = context.model.vocab
        self._parser_of = template.rules.grounding
        self._defaults = defaults or Sampling()
        model = context.model
        self._reader = Reader(template, store, model.vocab, context.n_ctx, on_drop, model.hparams.n_ctx_train)
        self._lock = threading.RLock()  # of the drafts
        self._drafts: dict[int, Draft] = {}  # by thread

    def __repr__(self) -> str:
        return f"Session({self.n_cached} of {self.n_ctx} tokens in use)"

    @property
    def on_drop(self) -> Callable[[int], None] | None:
        """Called with the number of messages when the oldest had to go because the context is full."""
        return self._reader.on_drop

    @on_drop.setter
    def on_drop(self, on_drop: Callable[[int], None] | None) -> None:
        self._reader.on_drop = on_drop

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
        progress: StageProgress | None = None,
    ) -> int:
        """Encode and prefill the known part of the next prompt, its last message left open.

        Args:
            cancel: set it to stop; the cells prefilled until then are kept.

        Returns:
            KV cells prefilled.

        Raises:
            Cancelled: it was stopped.
            PromptError, ImageError, ContextFullError: as `generate`.
        """
        draft = Draft(cancelled=cancel or threading.Event())
        with self._current(draft):
            reserve = min(MAX_TOKENS, self.n_ctx // 8)
            units = self._reader.read(messages, draft, reserve, progress, number_images, complete=False)
            job = draft.job = self.engine.submit(Request(units), draft.cancelled)
            for _ in self._pieces(job, progress):
                pass
        if job.error is not None:
            raise job.error
        if job.read_tokens < job.prompt_tokens - job.cached_tokens:
            raise Cancelled("stopped while reading the prompt")
        return job.prompt_tokens - job.cached_tokens

    @explicit
    def generate(self, messages: Sequence[Message], **options: Unpack[ReplyOptions]) -> Stream:
        """Reply to a conversation.

        Args:
            messages: see `ChatTemplate.render`.
            options: see `Model.generate`.

        Raises:
            InputError: an option out of bounds, a schema or grammar that cannot be used.
            PromptError, ImageError, ContextFullError: raised by the stream, when the prompt is read.
        """
        options = with_defaults(options)
        sampler = self._sampler(options)
        draft = Draft(seed=sampler.seed)
        return Stream(self._steps(messages, draft, sampler, options), draft)

    def _sampler(self, options: ReplyOptions) -> Sampler:
        """The sampler of a reply, once all its options are checked."""
        check_whole("max_tokens", options["max_tokens"], 1)
        grammar, schema = options["grammar"], options["schema"]
        if schema is not None and grammar is not None:
            raise InputError("a grammar and a schema, expected one of them")
        StopStrings(options["stop"])
        chosen: dict[str, Any] = {name: value for name, value in options.items() if name in _SAMPLING}
        sampling = self._defaults.override(**chosen)
        if schema is not None:
            grammar = schema_to_grammar(schema)
        return Sampler(self._vocab, sampling, grammar)

    def clear(self) -> None:
        """Forget the conversation. The embeddings of its pictures stay at hand."""
        self.engine.check_process()
        with self._lock:
            for draft in self._drafts.values():
                draft.cancel()
        self._reader.forget()
        self.engine.clear()

    def close(self) -> None:
        """Free the context and cancel replies under way. Doing it twice is harmless."""
        self.engine.close()

    # -- the reply

    def _steps(
        self, messages: Sequence[Message], draft: Draft, sampler: Sampler, options: ReplyOptions
    ) -> Generator[Piece, None, FinishReason]:
        max_tokens, progress = options["max_tokens"], options["progress"]
        with self._current(draft):
            reserve = min(max_tokens, self.n_ctx // 8)
            units = self._reader.read(
                messages, draft, reserve, progress, options["number_images"], complete=True
            )
            request = Request(units, (sampler,), max_tokens, tuple(options["stop"]))
            pictures = [unit.picture for unit in units if isinstance(unit, VisionUnit) and unit.picture]
            readable = ReadableReply(self._parser_of, pictures, question_of(messages))
            draft.readable = readable
            job = draft.job = self.engine.submit(request, draft.cancelled)
            try:
                for piece in self._pieces(job, progress):
                    yield _readable(piece, readable, readable.feed(piece.raw))
                if rest := readable.finish():
                    yield _readable(Piece("", ()), readable, rest)
            finally:
                draft.cancel()  # where it has not ended, nobody reads it any more
                self._reader.remember(job.samples[0].text, job.samples[0].tokens)
            if job.error is not None:
                raise job.error
            return job.samples[0].reason or "cancelled"

    def _pieces(self, job: Job, progress: StageProgress | None) -> Iterator[Piece]:
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
    def _current(self, draft: Draft) -> Iterator[None]:
        """While the body runs, this is what the thread reads; what it has left unread ends."""
        self.engine.check_process()
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


def _readable(piece: Piece, reply: ReadableReply, events: Sequence[Event]) -> Piece:
    """The piece with the text and boxes that it completes."""
    text = "".join(event.text for event in events)
    boxes = tuple(reply.json(event.box) for event in events if event.box is not None)
    return replace(piece, text=text, boxes=boxes)
