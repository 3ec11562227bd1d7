"""Decodes batches: the unread units of all slots, and the next token of every reply."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from qvl.runtime.engine.batches import Parts, Vectors, advance, token_batch, vision_batch
from qvl.runtime.engine.slot import Slot, Slots
from qvl.runtime.engine.units import Unit
from qvl.runtime.errors import Cancelled
from qvl.runtime.llama.batch import Batch
from qvl.runtime.llama.context import Context

if TYPE_CHECKING:
    from qvl.runtime.engine.request import Job

_STALL_SECONDS: Final = 0.5  # that replies may wait for the prompts read beside them
_LEAST: Final = 32  # tokens of a prompt read at a time beside replies; 8 take two thirds of the time of 32


@dataclass(frozen=True)
class Ready:
    """A slot has read its queue; the logits that follow it are in this row of the last batch."""

    slot: Slot
    row: int


@dataclass(frozen=True)
class Failed:
    """A job whose batch failed."""

    job: Job
    error: Exception


class Decoding:
    """Decodes for slots.

    Args:
        interleave: go on with replies while prompts are read, a little of these at a time.
        seconds: the time spent is added to its "prefill" and "generate".

    Attributes:
        postponed: prompts could have been read in the last step, which went to the image encoder.
    """

    def __init__(
        self, context: Context, slots: Slots, seconds: dict[str, float], *, interleave: bool
    ) -> None:
        self._context, self._slots, self._seconds = context, slots, seconds
        self.postponed = False
        self._interleave = interleave
        self._token_seconds = 0.0  # of a prompt, as measured last

    def step(
        self, vectors: Vectors, cancelled: Callable[[], bool], *, encoded: bool = False
    ) -> Iterator[Ready | Failed]:
        """Decode one batch of embeddings and one of tokens; without interleaving only one of the two.

        Beside replies both batches together read as much of the prompts as takes `_STALL_SECONDS`. What is
        yielded must be dealt with before the next is asked for.

        Args:
            vectors: the embeddings that are there.
            cancelled: asked every 50 ms; when true, the batch is stopped, and the slots are as before.
            encoded: replies have waited for the image encoder in this step; no prompt is read beside them.
        """
        slots = self._slots.reading
        replies = [slot for slot in slots if _writes(slot)]
        prompts = [slot for slot in slots if not _writes(slot)]
        limit = self._context.n_batch
        self.postponed = False
        if replies and self._interleave:
            pace = self._token_seconds
            limit = min(limit, max(_LEAST, int(_STALL_SECONDS / pace) if pace else _LEAST))
            if encoded:
                self.postponed = any(_is_there(slot, vectors) for slot in prompts)
                limit = 0
        found = vision_batch(prompts, vectors, limit)
        if found is not None:
            yield from self._run(*found, cancelled)
            if not self._interleave:
                return
            if replies:
                limit -= len(found[0])
        slots = self._slots.reading
        slots.sort(key=lambda slot: not _writes(slot))
        found = token_batch(slots, min(limit + len(replies), self._context.n_batch))
        if found is not None:
            yield from self._run(*found, cancelled)

    def _run(self, batch: Batch, parts: Parts, cancelled: Callable[[], bool]) -> Iterator[Ready | Failed]:
        """Decode a batch. A job that is cancelled while its prompt is read stops it."""
        jobs = {slot.job: None for slot, _ in parts if slot.job is not None}
        reading = [job for job in jobs if not job.started]
        started = time.perf_counter()
        try:
            self._context.decode(batch, lambda: cancelled() or any(job.cancelled.is_set() for job in reading))
        except Exception as e:
            for slot, _ in parts:
                self._restore(slot)
            if not isinstance(e, Cancelled):
                yield from (Failed(job, e) for job in jobs)
            return
        self._account(len(batch), parts, time.perf_counter() - started)
        rows = np.cumsum([n for _, n in parts]) - 1
        yield from [
            Ready(slot, int(row)) for (slot, n), row in zip(parts, rows, strict=True) if advance(slot, n)
        ]

    def _restore(self, slot: Slot) -> None:
        """Make a slot as it was before the batch that failed."""
        if self._slots.can_cut:
            self._slots.cut(slot, len(slot.units))
        else:
            queue: list[Unit] = [*slot.units, *slot.queue]
            self._slots.cut(slot, 0)
            slot.queue = queue

    def _account(self, n_batch: int, parts: Parts, seconds: float) -> None:
        read = sum(n for slot, n in parts if not _writes(slot))
        self._seconds["prefill"] += seconds * read / n_batch
        self._seconds["generate"] += seconds * (1 - read / n_batch)
        if read >= _LEAST:
            self._token_seconds = seconds / n_batch
        for job, slot, n in {slot.job: (slot.job, slot, n) for slot, n in parts}.values():
            if job is None:
                continue
            if _writes(slot):
                job.generate_seconds += seconds
            else:
                job.prefill_seconds += seconds
                job.read_tokens += n
                total = job.prompt_tokens - job.cached_tokens
                job.progress.append(("prefill", min(1.0, job.read_tokens / max(1, total))))


def _is_there(slot: Slot, vectors: Vectors) -> bool:
    """True if the head of its queue can be read: text, or a picture that was encoded."""
    head = slot.queue[0]
    return isinstance(head, int) or head.key in vectors


def _writes(slot: Slot) -> bool:
    """True if its job has read the prompt."""
    return slot.sample is not None and bool(slot.sample.tokens)
