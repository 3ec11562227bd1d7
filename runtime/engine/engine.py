"""Continuous batching: many pictures in one context, each slot refilled as it falls free.

Sequence 0 of the context holds what every prompt begins with, the system prompt and the words before the
picture. It is computed once; every other sequence begins with a copy, which shares its KV cells. A job
takes a sequence for each of its samples, and the picture is encoded and read once for all of them.

One `step` encodes and reads the pictures of the jobs that are new, several in one batch where they are
small, then takes one token further everything that is under way: the words after a picture and the next
token of every reply go through the model together.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from types import TracebackType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qvl.runtime.activity import Activity
from qvl.runtime.engine.request import Done, Job, Request
from qvl.runtime.engine.units import common_prefix
from qvl.runtime.errors import Cancelled
from qvl.runtime.llama.batch import Batch
from qvl.runtime.llama.context import Context
from qvl.runtime.llama.model import LlamaModel
from qvl.runtime.llama.sampler import Sampler
from qvl.runtime.prompt.chatml import ChatTemplate, TextChunk
from qvl.runtime.prompt.positions import VisionSpan, mrope_positions
from qvl.runtime.vision.encoder import VisionEncoder

N_BATCH: Final = 512
_PREFIX: Final = 0  # the sequence of the shared beginning
_LOOKING: Final = "looking"


@dataclass
class _Slot:
    """A sequence at work on a sample.

    Attributes:
        queue: tokens that are to be decoded: the prompt's rest, or the one sampled last.
        position: of the first of them.
    """

    sequence: int
    sampler: Sampler
    queue: list[int]
    position: int
    tokens: list[int] = field(default_factory=list)
    reason: str | None = None


@dataclass
class _Work:
    """A job under way."""

    job: Job
    head: list[int]
    span: VisionSpan
    tail: list[int]
    started: float
    slots: list[_Slot] = field(default_factory=list)
    n_shared: int = 0
    embeddings: NDArray[np.float32] | None = None

    @property
    def n_prompt(self) -> int:
        return len(self.head) + self.span.n_tokens + len(self.tail)


class BatchCaptioner:
    """Captions up to `parallel` sequences together. Use as a context manager, or call `close`.

    Args:
        open_context: makes the context, given its number of sequences.
        cancelled: asked during long work; when true, `step` raises Cancelled.
        activity: told how far the encoder is.

    Attributes:
        seconds: spent in encode, prefill and generate.
    """

    def __init__(
        self,
        text: LlamaModel,
        vision: VisionEncoder,
        template: ChatTemplate,
        request: Request,
        *,
        parallel: int,
        open_context: Callable[[int], Context],
        cancelled: Callable[[], bool] | None = None,
        activity: Activity | None = None,
    ) -> None:
        self.request = request
        self._activity = activity or Activity()
        self.seconds = {"encode": 0.0, "prefill": 0.0, "generate": 0.0}
        self._text, self._vision, self._template = text, vision, template
        self._cancelled = cancelled or (lambda: False)
        self._context = open_context(parallel + 1)
        self._sequences = list(range(parallel, _PREFIX, -1))  # those that are free
        self._waiting: deque[_Work] = deque()
        self._working: list[_Work] = []
        self._failed: list[Done] = []
        self._prefix: list[int] = []
        self._start = text.vocab.tokenize(request.start)

    # the runner's side -----------------------------------------------------------------------------

    @property
    def free(self) -> int:
        """Jobs it would take now."""
        wanted = sum(len(work.job.seeds) for work in self._waiting)
        return max(0, len(self._sequences) - wanted)

    @property
    def busy(self) -> bool:
        """Whether it has jobs that are not done."""
        return bool(self._waiting or self._working or self._failed)

    def submit(self, job: Job) -> None:
        """Take a job. One that cannot fit the context comes back as failed at the next step."""
        work = self._work(job)
        cells = self._cells(work)
        if cells > self._context.n_ctx - len(self._prefix):
            self._failed.append(Done(job.key, error=self._too_large(work, cells)))
        else:
            self._waiting.append(work)

    def step(self) -> list[Done]:
        """Take everything one token further, new jobs up to their first.

        Raises:
            Cancelled: asked to stop. BackendError: the model failed.
        """
        done, self._failed = self._failed, []
        self._admit()
        if self._working:
            self._advance()
        for work in [work for work in self._working if all(slot.reason for slot in work.slots)]:
            self._working.remove(work)
            done.append(self._done(work))
        return done

    def close(self) -> None:
        """Free the context and what is under way."""
        for slot in self._slots():
            slot.sampler.close()
        self._working.clear()
        self._waiting.clear()
        self._context.close()

    def __enter__(self) -> BatchCaptioner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    # jobs ------------------------------------------------------------------------------------------

    def _work(self, job: Job) -> _Work:
        texts = [{"type": "text", "text": text} if text else None for text in (job.before, job.after)]
        parts = [part for part in (texts[0], {"type": job.kind, job.kind: job.frames}, texts[1]) if part]
        messages: list[dict[str, Any]] = [{"role": "user", "content": parts}]
        if self.request.system is not None:
            messages.insert(0, {"role": "system", "content": self.request.system})
        head, _, tail = self._template.render(messages)
        assert isinstance(head, TextChunk) and isinstance(tail, TextChunk)
        frames = -(-len(job.frames) // self._vision.preprocessor.temporal_patch_size)
        factor = self._vision.preprocessor.factor
        span = VisionSpan(frames, job.frames.shape[1] // factor, job.frames.shape[2] // factor)
        return _Work(job, list(head.tokens), span, [*tail.tokens, *self._start], time.perf_counter())

    def _cells(self, work: _Work) -> int:
        """KV cells that a job takes at most, without the shared beginning."""
        shared = common_prefix(self._prefix, work.head)
        replies = len(work.job.seeds) * (self.request.max_tokens + 1)
        return work.n_prompt - shared + replies

    def _too_large(self, work: _Work, cells: int) -> str:
        n, n_ctx = work.span.n_tokens, self._context.n_ctx
        area = (n_ctx - len(self._prefix) - (cells - n)) * self._vision.preprocessor.factor**2
        smaller = f"`max_pixels` {area} would fit, or " if area > 0 else ""
        return (
            f"the {work.job.kind} with its words and replies takes {cells} tokens ({n} of them its own), "
            f"the context holds {n_ctx}: {smaller}a larger context (`n_ctx`)"
        )

    def _admit(self) -> None:
        """Begin the jobs for which there are sequences and cells."""
        new: list[_Work] = []
        used = len(self._prefix) + sum(map(self._cells, self._working))
        while self._waiting and len(self._waiting[0].job.seeds) <= len(self._sequences):
            cells = self._cells(self._waiting[0])
            if used + cells > self._context.n_ctx and used > len(self._prefix):
                break
            used += cells
            work = self._waiting.popleft()
            self._begin(work)
            new.append(work)
        if new:
            self._encode(new)
            self._read(new)

    def _begin(self, work: _Work) -> None:
        sampling, vocab = self.request.sampling, self._text.vocab
        work.started = time.perf_counter()
        for seed in work.job.seeds:
            sampler = Sampler(vocab, replace(sampling, seed=seed), self.request.grammar)
            work.slots.append(_Slot(self._sequences.pop(), sampler, [], 0))
        self._working.append(work)

    def _done(self, work: _Work) -> Done:
        texts, reasons = [], []
        for slot in work.slots:
            self._context.remove(slot.sequence, 0)
            self._sequences.append(slot.sequence)
            slot.sampler.close()
            texts.append(self._text.vocab.detokenize(slot.tokens))
            reasons.append(slot.reason or "stop")
        return Done(
            work.job.key,
            tuple(texts),
            tuple(reasons),
            work.n_prompt,
            sum(len(slot.tokens) for slot in work.slots),
            time.perf_counter() - work.started,
        )

    def _slots(self) -> Iterator[_Slot]:
        return chain.from_iterable(work.slots for work in self._working)

    # the prompt ------------------------------------------------------------------------------------

    def _encode(self, new: Sequence[_Work]) -> None:
        started = time.perf_counter()
        patches = [self._vision.preprocessor.patchify(work.job.frames) for work in new]
        made = self._vision.encode_patches(patches, self._looking)
        self._activity.over(_LOOKING)
        for work, embedding in zip(new, made, strict=True):
            work.embeddings = embedding.embeddings
        self.seconds["encode"] += time.perf_counter() - started

    def _looking(self, share: float) -> bool:
        self._activity.at(_LOOKING, share)
        return not self._cancelled()

    def _read(self, new: Sequence[_Work]) -> None:
        """Bring the new jobs' sequences to the end of their pictures, and queue the words that follow."""
        started = time.perf_counter()
        if not self._prefix:
            self._prefix = new[0].head
            for i in range(0, len(self._prefix), N_BATCH):
                self._decode(Batch.of_tokens(self._prefix[i : i + N_BATCH], i, _PREFIX))
        rows: list[tuple[NDArray[np.float32], NDArray[np.int32], int]] = []
        for work in new:
            first = work.slots[0]
            work.n_shared = common_prefix(self._prefix, work.head)
            self._context.copy(_PREFIX, first.sequence)
            self._context.remove(first.sequence, work.n_shared)
            for i in range(work.n_shared, len(work.head), N_BATCH):
                self._decode(Batch.of_tokens(work.head[i : i + N_BATCH], i, first.sequence))
            positions, first.position = mrope_positions([work.span], len(work.head))
            assert work.embeddings is not None
            rows.append((work.embeddings, positions, first.sequence))
            first.queue = work.tail
            work.embeddings = None
        for batch in _embedding_batches(rows):
            self._decode(batch)
        for work in new:
            first, *others = work.slots
            for slot in others:
                self._context.copy(first.sequence, slot.sequence)
                slot.queue, slot.position = list(first.queue), first.position
        self.seconds["prefill"] += time.perf_counter() - started

    # tokens ----------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Decode what every sequence has queued, and sample the next token of each."""
        active = [slot for slot in self._slots() if slot.reason is None]
        n_read = sum(len(slot.queue) for slot in active if not slot.tokens)
        n_all = sum(len(slot.queue) for slot in active)
        started = time.perf_counter()
        for parts in _token_batches(active):
            self._decode(_as_batch(parts))
            row = -1
            for slot, tokens in parts:
                row += len(tokens)
                slot.position += len(tokens)
                slot.queue = slot.queue[len(tokens) :]
                if not slot.queue:
                    self._take(slot, slot.sampler.sample(self._context, row))
        seconds = time.perf_counter() - started
        self.seconds["prefill"] += seconds * n_read / n_all
        self.seconds["generate"] += seconds * (n_all - n_read) / n_all

    def _take(self, slot: _Slot, token: int | None) -> None:
        if token is None or token in self._text.vocab.end_tokens:
            slot.reason = "stop"
            return
        slot.tokens.append(token)
        slot.queue = [token]
        if len(slot.tokens) >= self.request.max_tokens:
            slot.reason = "length"

    def _decode(self, batch: Batch) -> None:
        if self._cancelled():
            raise Cancelled("stopped at once")
        self._context.decode(batch, self._cancelled)


def _embedding_batches(
    rows: Iterable[tuple[NDArray[np.float32], NDArray[np.int32], int]],
) -> Iterator[Batch]:
    """Vision spans of several sequences, end to end, in batches of at most N_BATCH."""
    parts = list(rows)
    embeddings = np.concatenate([e for e, _, _ in parts])
    positions = np.concatenate([p for _, p, _ in parts], axis=1)
    sequences = np.repeat([s for _, _, s in parts], [len(e) for e, _, _ in parts]).astype(np.int32)
    for i in range(0, len(embeddings), N_BATCH):
        part = slice(i, i + N_BATCH)
        n = len(embeddings[part])
        yield Batch(None, embeddings[part], positions[:, part], sequences[part], np.zeros(n, np.bool_))


def _token_batches(slots: Iterable[_Slot]) -> Iterator[list[tuple[_Slot, list[int]]]]:
    """What the slots have queued, in batches of at most N_BATCH tokens, several slots to a batch."""
    parts: list[tuple[_Slot, list[int]]] = []
    room = N_BATCH
    for slot in slots:
        queue = list(slot.queue)
        while queue:
            piece, queue = queue[:room], queue[room:]
            parts.append((slot, piece))
            room -= len(piece)
            if room == 0:
                yield parts
                parts, room = [], N_BATCH
    if parts:
        yield parts


def _as_batch(parts: Sequence[tuple[_Slot, list[int]]]) -> Batch:
    tokens = np.fromiter(chain.from_iterable(piece for _, piece in parts), np.int32)
    positions = np.concatenate(
        [np.arange(slot.position, slot.position + len(piece), dtype=np.int32) for slot, piece in parts]
    )
    counts = [len(piece) for _, piece in parts]
    sequences = np.repeat([slot.sequence for slot, _ in parts], counts).astype(np.int32)
    outputs = np.zeros(len(tokens), np.bool_)
    ends = np.cumsum(counts) - 1
    outputs[ends] = [len(piece) == len(slot.queue) for slot, piece in parts]
    return Batch(tokens, None, positions, sequences, outputs)
