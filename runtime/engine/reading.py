"""Reads messages into the units of a prompt that fits the context, with the tokens of earlier replies."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final

from qvl.runtime.engine.draft import Draft
from qvl.runtime.engine.reply import StageProgress
from qvl.runtime.engine.store import EmbeddingStore
from qvl.runtime.engine.units import Unit
from qvl.runtime.engine.window import Fitter
from qvl.runtime.llama.vocab import Vocab
from qvl.runtime.prompt.chatml import ChatTemplate
from qvl.runtime.prompt.messages import Message

_MAX_REPLIES: Final = 256


class Reader:
    """Reads the messages of conversations. Safe for threads.

    Attributes:
        on_drop: called with the number of messages when the oldest had to go because the context is full.
    """

    def __init__(
        self,
        template: ChatTemplate,
        store: EmbeddingStore,
        vocab: Vocab,
        n_ctx: int,
        on_drop: Callable[[int], None] | None = None,
        n_trained: int = 1 << 30,
    ) -> None:
        """n_trained: tokens of the longest context that the model was trained on."""
        self.on_drop = on_drop
        self._template, self._store, self._vocab = template, store, vocab
        self._fitter = Fitter(n_ctx, store.token_pixels, n_trained)
        self._replies: OrderedDict[str, tuple[int, ...]] = OrderedDict()
        self._lock = threading.RLock()

    def read(
        self,
        messages: Sequence[Message],
        draft: Draft,
        reserve: int,
        progress: StageProgress | None,
        number_images: bool,
        *,
        complete: bool,
    ) -> list[Unit]:
        """The units of a prompt, as many of its last messages as leave `reserve` cells free.

        Args:
            draft: gets the number of messages left out and the seconds; once cancelled, reading stops.
            complete: see `ChatTemplate.render`.
        """

        def watch(fraction: float) -> bool:
            if progress is not None:
                progress("frames", fraction)
            return not draft.cancelled.is_set()

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

    def remember(self, text: str, tokens: Sequence[int]) -> None:
        """Keep the tokens of a reply, so that its text is not tokenized another way in the next prompt."""
        if tokens and self._vocab.detokenize(tokens) == text:
            with self._lock:
                self._replies[text] = tuple(tokens)
                self._replies.move_to_end(text)
                if len(self._replies) > _MAX_REPLIES:
                    self._replies.popitem(last=False)

    def forget(self) -> None:
        """Begin a new conversation."""
        with self._lock:
            self._replies.clear()
            self._fitter.forget()
