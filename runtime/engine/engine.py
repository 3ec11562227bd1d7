"""Continuous batching: requests in the slots of one KV cache, read and answered together.

A request takes the free slot that shares the longest prefix with it, or a copy of a busy one's prefix; where
that slot has yet to read the prefix, the request waits until it has. Only what the cache lacks is read.

A step does some of the work of everything under way: some layers of the image encoder, then one batch of
embeddings and one of tokens, in which the prompts' text and the next token of every reply go through the
decoder together. Beside replies, steps that encode and steps that read prompts take turns. Work is done only
while somebody steps.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType

from qvl.runtime.engine.decoding import Decoding, Failed
from qvl.runtime.engine.encoding import Embedder, Encodings
from qvl.runtime.engine.reply import TokenLogprob
from qvl.runtime.engine.request import Job, Request, Sample
from qvl.runtime.engine.slot import Slot, Slots
from qvl.runtime.engine.turns import Turns
from qvl.runtime.engine.units import VisionUnit, n_cells
from qvl.runtime.errors import BackendError, ContextFullError, InputError, Unpicklable
from qvl.runtime.interrupt import held_interrupts
from qvl.runtime.llama.context import Context


class Engine(Unpicklable):
    """Answers requests in the slots of a context. Use as a context manager, or call `close`.

    Any thread may submit and cancel. One thread at a time steps; `turn` sees to that.

    Args:
        context: belongs to the engine from now on; each of its sequences is a slot.
        embedder: makes the embeddings of vision units.
        interleave: go on with replies while pictures are encoded and long prompts are read. Without it new
            pictures come first, all of them, so that more replies are then written together.

    Attributes:
        seconds: spent in encode, prefill and generate.
    """

    def __init__(self, context: Context, embedder: Embedder, *, interleave: bool = True) -> None:
        self.seconds = {"encode": 0.0, "prefill": 0.0, "generate": 0.0}
        self._context = context
        self._vocab = context.model.vocab
        self._slots = Slots(context, can_cut=context.model.hparams.architecture.can_rewind)
        self._encoding = Encodings(embedder)
        self._interleave = interleave
        self._decoding = Decoding(context, self._slots, self.seconds, interleave=interleave)
        self._waiting: deque[Job] = deque()
        self._ended: list[Job] = []
        self._turns = Turns()
        self._closed = False

    @property
    def n_ctx(self) -> int:
        """KV cells, for all slots together."""
        return self._context.n_ctx

    @property
    def n_cached(self) -> int:
        """KV cells in use."""
        return self._slots.n_used

    @property
    def free(self) -> int:
        """Samples for which there is a slot now."""
        wanted = sum(max(1, len(job.samples)) for job in tuple(self._waiting))
        return max(0, len(self._slots.free) - wanted)

    @property
    def busy(self) -> bool:
        """True if there are jobs that have not ended."""
        return bool(self._waiting or self._ended or self._slots.busy)

    @property
    def encoding(self) -> float | None:
        """Fraction done of the pictures in the encoder; None when there are none."""
        return self._encoding.share

    def check_process(self) -> None:
        """See that this process loaded the model; a forked child would wait for threads that it lacks.

        Raises:
            BackendError: another process loaded it.
        """
        self._context.model.check_process()

    # requests --------------------------------------------------------------------------------------

    def submit(self, request: Request, cancelled: threading.Event | None = None) -> Job:
        """Take a request; work on it begins with the next step.

        Args:
            cancelled: set it to end the job, as `Job.cancel` does.

        Raises:
            InputError: an empty prompt, or more samples than slots.
            ContextFullError: the prompt can never fit.
            BackendError: the engine is closed, or the model was loaded in another process.
        """
        self.check_process()
        if self._closed:
            raise BackendError("the engine is closed")
        n = max(1, len(request.samplers))
        if not request.units or n > len(self._slots.all):
            raise InputError(
                f"a prompt of {len(request.units)} units and {n} replies, expected at least 1 unit and at "
                f"most {len(self._slots.all)} replies"
            )
        job = Job.of(request, self._vocab, cancelled)
        if job.prompt_tokens + (n if n > 1 else 0) > self.n_ctx:
            raise ContextFullError(
                f"the prompt takes {job.prompt_tokens} tokens, the context holds {self.n_ctx}",
                n_tokens=job.prompt_tokens, n_ctx=self.n_ctx, hint="use a larger context",
            )  # fmt: skip
        self._waiting.append(job)
        return job

    def turn(self, job: Job) -> None:
        """Do a step for a job that is not done, or wait while another thread does one."""
        self.check_process()
        with self._turns.next() as mine:
            if mine and not job.done:
                self.step()

    def step(self, cancelled: Callable[[], bool] = lambda: False) -> list[Job]:
        """Do some of the work under way.

        Args:
            cancelled: asked every 50 ms; when true, the step ends early.

        Returns:
            The jobs that have ended since the last step. What went wrong with one is in its `error`.

        Raises:
            KeyboardInterrupt: once the step is over; the jobs are as they were, and can go on.
        """
        with held_interrupts() as pressed:
            self._drop()
            if self._closed:
                return []
            self._follow()
            self._admit()
            encoded = not self._decoding.postponed and self._encode()
            if self._interleave or self._encoding.share is None:
                self._decode(lambda: pressed() or cancelled(), encoded=encoded)
            ended, self._ended = self._ended, []
            return ended

    def clear(self) -> None:
        """Forget what the free slots hold."""
        self.check_process()
        if self._closed:
            return
        with self._turns.alone():
            self._drop()
            for slot in self._slots.free:
                self._slots.cut(slot, 0)

    def close(self) -> None:
        """End all jobs as cancelled, and free the context. Doing it twice is harmless.

        In a forked child it does nothing: they are the parent's.
        """
        if not self._context.model.is_ours:
            return
        self._closed = True
        with self._turns.alone():
            self._drop()
            self._encoding.close()
            self._context.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    # slots -----------------------------------------------------------------------------------------

    def _drop(self) -> None:
        """End the jobs that were cancelled."""
        jobs = dict.fromkeys((*self._waiting, *(slot.job for slot in self._slots.busy)))
        for job in jobs:
            if job is not None and (job.cancelled.is_set() or self._closed):
                self._end(job)

    def _follow(self) -> None:
        """Copy what leaders have read by now; a job whose leader has gone is admitted anew."""
        for slot in self._slots.busy:
            job = slot.job
            if slot.leader is not None and job is not None and not self._slots.follow(slot):
                for each in self._of(job):
                    self._slots.release(each)
                self._waiting.appendleft(job)

    def _admit(self) -> None:
        """Give slots to the jobs that wait, in order, while there are slots and cells."""
        while self._waiting:
            job = self._waiting[0]
            n = len(job.samples)
            room = (self.n_ctx - job.prompt_tokens) // max(1, n)
            most = len(job.request.units) - (n > 0)  # the last one goes through again, for what follows it
            limit = job.prompt_tokens + min(room, job.request.max_tokens if n else 0)
            slots = self._slots.take(job.request.units, max(1, n), limit, most)
            if slots is None:
                return
            self._waiting.popleft()
            for slot, sample in zip(slots, job.samples or (None,), strict=True):
                slot.job, slot.sample = job, sample
            job.cached_tokens = job.prompt_tokens - n_cells(slots[0].queue)
            if slots[0].leader is not None:
                job.cached_tokens = slots[0].shared
            if not slots[0].queue:
                self._end(job)

    def _of(self, job: Job) -> list[Slot]:
        return [slot for slot in self._slots.all if slot.job is job]

    def _end(self, job: Job, error: Exception | None = None) -> None:
        """Free what a job has; samples that have not ended were cancelled."""
        for slot in self._of(job):
            self._slots.release(slot, job.request.keep)
        if job in self._waiting:
            self._waiting.remove(job)
        job.end("cancelled", error)
        self._ended.append(job)
        self._forget_vectors()

    # pictures --------------------------------------------------------------------------------------

    def _encode(self) -> bool:
        """Encode some of the pictures that are needed; False where that took no time."""
        wanted: dict[Job, list[VisionUnit]] = {}
        for slot in self._slots.reading:
            units = [unit for unit in slot.queue if isinstance(unit, VisionUnit)]
            if units and slot.job is not None:
                wanted[slot.job] = units
        seconds, failed = self._encoding.advance(wanted)
        self.seconds["encode"] += seconds
        for job, error in failed:
            self._end(job, error)
        return seconds > 0

    def _forget_vectors(self) -> None:
        self._encoding.keep(unit for slot in self._slots.busy for unit in slot.queue)

    # tokens ----------------------------------------------------------------------------------------

    def _decode(self, cancelled: Callable[[], bool], *, encoded: bool) -> None:
        for outcome in self._decoding.step(self._encoding.vectors, cancelled, encoded=encoded):
            if isinstance(outcome, Failed):
                self._end(outcome.job, outcome.error)
            else:
                self._go_on(outcome.slot, outcome.row)
        if self._encoding.vectors:
            self._forget_vectors()

    def _go_on(self, slot: Slot, row: int) -> None:
        """The slot has read its queue: sample what follows, for all samples if it was the prompt."""
        job = slot.job
        if job is None:
            return
        slots = [slot]
        if not job.started:
            job.started = True
            others = [other for other in self._of(job) if other is not slot]
            for other in others:
                self._slots.copy(slot, other, len(slot.units))
            slots = [slot, *others]
        for each in slots:
            if each.sample is not None:
                started = time.perf_counter()
                self._sample(each, each.sample, row)
                job.generate_seconds += time.perf_counter() - started
        if all(sample.reason is not None for sample in job.samples):
            self._end(job)

    def _sample(self, slot: Slot, sample: Sample, row: int) -> None:
        job = slot.job
        assert job is not None
        token = sample.sampler.sample(self._context, row)
        if token is None or token in self._vocab.end_tokens:
            sample.finish("stop")
        else:
            n = job.request.logprobs
            logprob = None if n is None else TokenLogprob.of(self._context.row(row), token, n)
            if sample.add(token, logprob):
                sample.finish("stop")
            elif len(sample.tokens) >= job.request.max_tokens or slot.n_cells >= slot.limit:
                sample.finish("length")
            else:
                slot.queue = [token]
        if sample.reason is not None:
            self._slots.release(slot, job.request.keep)
