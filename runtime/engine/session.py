"""One conversation in a KV cache: what it holds is never computed again.

The messages of a turn are rendered whole, and compared with what the cache holds, unit by unit (a unit is
a text token or a whole vision span). From the first difference on the cache is cut back and the rest is
prefilled. So a new turn costs its own tokens, and editing or undoing one is nothing but sending other
messages.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Final

from qvl.runtime.engine.batches import batches
from qvl.runtime.engine.fit import Fitter
from qvl.runtime.engine.reply import Draft, FinishReason, Piece, Progress, Stream
from qvl.runtime.engine.store import EmbeddingStore
from qvl.runtime.engine.text import ReplyText, StopStrings
from qvl.runtime.engine.units import Unit, VisionUnit, common_prefix, n_cells, n_positions, n_vision_cells
from qvl.runtime.errors import Cancelled, InputError
from qvl.runtime.grammar.schema import schema_to_grammar
from qvl.runtime.llama.context import Context
from qvl.runtime.llama.sampler import Sampler, Sampling
from qvl.runtime.prompt.chatml import ChatTemplate
from qvl.runtime.prompt.messages import Message

MAX_TOKENS: Final = 1024
_MAX_REPLIES: Final = 256


class Session:
    """A conversation, or any sequence of prompts that share beginnings.

    Threads take turns: a `prefill` in the background and a `generate` may overlap, one waits for the other.

    Attributes:
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
        """The context belongs to the session from now on; its sequence 0 is used."""
        self.on_drop = on_drop
        self._context = context
        self._store = store
        self._template = template
        self._defaults = defaults or Sampling()
        self._fitter = Fitter(context.n_ctx)
        self._lock = threading.RLock()
        self._units: list[Unit] = []
        self._n_cells = self._position = 0  # of the units
        self._replies: OrderedDict[str, tuple[int, ...]] = OrderedDict()
        self._turn = 0
        self._current: Draft | None = None

    @property
    def n_ctx(self) -> int:
        """KV cells of the context."""
        return self._context.n_ctx

    @property
    def n_cached(self) -> int:
        """KV cells in use."""
        return self._n_cells

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
        draft = Draft(cancel=cancel or threading.Event())
        with self._lock:
            self._begin(draft)
            reserve = min(MAX_TOKENS, self.n_ctx // 8)
            units = self._read(messages, draft, reserve, progress, number_images, complete=False)
            self._bring(units, draft, progress, logits=False)
        return draft.prompt_tokens - draft.cached_tokens

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
        if max_tokens < 1:
            raise InputError(f"max_tokens is {max_tokens}, expected 1 or more")
        if schema is not None and grammar is not None:
            raise InputError("a grammar and a schema, expected one of them")
        sampling = self._defaults.override(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            repeat_penalty=repeat_penalty, seed=seed,
        )  # fmt: skip
        if schema is not None:
            grammar = schema_to_grammar(schema)
        stops = StopStrings(stop)
        sampler = Sampler(self._context.model.vocab, sampling, grammar)
        draft = Draft(seed=sampler.seed)
        steps = self._steps(messages, draft, sampler, stops, max_tokens, number_images, progress)
        return Stream(steps, draft)

    def clear(self) -> None:
        """Forget the conversation. The embeddings of its pictures stay at hand."""
        with self._lock:
            self._turn += 1
            self._replies.clear()
            self._fitter.forget()
            self._rewind(0)

    def close(self) -> None:
        """Free the context; what is under way is called off. Doing it twice is harmless."""
        if self._current is not None:
            self._current.cancel.set()
        with self._lock:
            self._turn += 1
            self._context.close()

    def _begin(self, draft: Draft) -> int:
        """Take the cache over: a stream that has not ended by now ends."""
        self._turn += 1
        self._current = draft
        return self._turn

    # -- the reply

    def _steps(
        self,
        messages: Sequence[Message],
        draft: Draft,
        sampler: Sampler,
        stops: StopStrings,
        max_tokens: int,
        number_images: bool,
        progress: Progress | None,
    ) -> Generator[Piece, None, FinishReason]:
        with sampler:
            with self._lock:
                turn = self._begin(draft)
                reserve = min(max_tokens, self.n_ctx // 8)
                units = self._read(messages, draft, reserve, progress, number_images, complete=True)
                self._bring(units, draft, progress, logits=True)
            text = ReplyText(self._context.model.vocab.decoder(), stops, draft)
            try:
                reason = yield from self._sample(sampler, text, draft, max_tokens, turn)
                if piece := text.finish():
                    yield piece
                return reason
            finally:
                self._remember(draft)

    def _sample(
        self, sampler: Sampler, text: ReplyText, draft: Draft, max_tokens: int, turn: int
    ) -> Generator[Piece, None, FinishReason]:
        ends = self._context.model.vocab.end_tokens
        while True:
            with self._lock, draft.clock("generate_seconds"):
                if draft.cancel.is_set() or turn != self._turn:
                    return "cancelled"
                token = sampler.sample(self._context)
                if token is None or token in ends:
                    return "stop"
                draft.tokens.append(token)
                piece = text.feed(token)
                full = len(draft.tokens) >= max_tokens or self.n_cached >= self.n_ctx
                if not (text.cut or full):
                    self._context.decode_tokens([token], self._position, outputs="last")
                    self._hold([token])
            if piece is not None:
                yield piece
            if text.cut:
                return "stop"
            if full:
                return "length"

    def _remember(self, draft: Draft) -> None:
        """Keep the tokens of a reply, so that its text is not tokenized another way in the next prompt."""
        if draft.tokens and self._context.model.vocab.detokenize(draft.tokens) == draft.text:
            self._replies[draft.text] = tuple(draft.tokens)
            self._replies.move_to_end(draft.text)
            if len(self._replies) > _MAX_REPLIES:
                self._replies.popitem(last=False)

    # -- the prompt

    def _read(
        self,
        messages: Sequence[Message],
        draft: Draft,
        reserve: int,
        progress: Progress | None,
        number_images: bool,
        *,
        complete: bool,
    ) -> list[Unit]:
        """The units of a prompt, as many of its last messages as fit."""
        watch = _watch("frames", draft, progress)

        def units_of(some: Sequence[Message]) -> list[Unit]:
            chunks = self._template.render(
                some, complete=complete, number_images=number_images, replies=self._replies.get
            )
            return self._store.units(chunks, watch)

        with draft.clock("encode_seconds"):
            fitted = self._fitter.fit(messages, units_of, reserve)
        draft.dropped_messages = fitted.n_dropped
        if fitted.n_new and self.on_drop is not None:
            self.on_drop(fitted.n_dropped)
        return fitted.units

    def _bring(self, units: list[Unit], draft: Draft, progress: Progress | None, *, logits: bool) -> None:
        """Make the cache hold the units; with `logits`, those after the last unit are ready at the end."""
        keep = common_prefix(self._units, units)
        if logits:
            keep = min(keep, len(units) - 1)  # the last token goes through again, for what follows it
        draft.prompt_tokens, draft.image_tokens = n_cells(units), n_vision_cells(units)
        draft.tokens_by_image = tuple(u.span.n_tokens for u in units if isinstance(u, VisionUnit))
        draft.cached_tokens = n_cells(units[:keep])
        if keep == len(units):
            return
        self._rewind(keep)
        try:
            self._encode(units[keep:], draft, progress)
            with draft.clock("prefill_seconds"):
                self._prefill(units[keep:], draft, progress, logits)
        finally:
            self._store.trim()

    def _rewind(self, keep: int) -> None:
        del self._units[keep:]
        self._n_cells, self._position = n_cells(self._units), n_positions(self._units)
        # also what an interrupted batch may have left beyond the units
        self._context.remove(0, self._position)

    def _hold(self, units: Sequence[Unit]) -> None:
        """Note that the cache now ends with these."""
        self._units.extend(units)
        self._n_cells += n_cells(units)
        self._position += n_positions(units)

    def _encode(self, units: Sequence[Unit], draft: Draft, progress: Progress | None) -> None:
        pictures = [unit for unit in units if isinstance(unit, VisionUnit)]
        if not pictures:
            return
        before = self._store.n_encoded
        with draft.clock("encode_seconds"):
            self._store.encode(pictures, _watch("encode", draft, progress))
        draft.images_encoded += self._store.n_encoded - before

    def _prefill(self, units: Sequence[Unit], draft: Draft, progress: Progress | None, logits: bool) -> None:
        done, total = 0, n_cells(units)
        steps = batches(
            units,
            self._store,
            position=self._position,
            n_batch=self._context.n_batch,
            outputs="last" if logits else "none",
        )
        for batch, whole in steps:
            if draft.cancel.is_set():
                raise Cancelled("stopped while reading the prompt")
            self._context.decode(batch, draft.cancel.is_set)
            self._hold(whole)
            done += len(batch)
            if progress is not None:
                progress("prefill", done / total)


def _watch(stage: str, draft: Draft, progress: Progress | None) -> Callable[[float], bool]:
    """Reports a stage, and says whether to go on."""

    def watch(fraction: float) -> bool:
        if progress is not None:
            progress(stage, fraction)
        return not draft.cancel.is_set()

    return watch
