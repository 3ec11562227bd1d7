"""Replies on the event loop's side: text, boxes and tool calls of each choice, progress, usage."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.concurrency import run_in_threadpool

from qvl.runtime.engine.reply import TokenLogprob
from qvl.runtime.engine.units import VisionUnit
from qvl.runtime.grounding.box import Event
from qvl.runtime.grounding.readable import ReadableReply
from qvl.runtime.model import Model
from qvl.runtime.serve.errors import ApiError
from qvl.runtime.serve.prompt import Prepared, prepare
from qvl.runtime.serve.schemas import ChatRequest
from qvl.runtime.serve.state import State
from qvl.runtime.serve.tools import Call, ToolParser
from qvl.runtime.serve.worker import QueueFull, Ticket, Update

_PREPARING = asyncio.Semaphore(4)  # prompts whose pictures are decoded at the same time


@dataclass(frozen=True)
class Delta:
    """New output of one choice.

    Attributes:
        boxes: that the text completes, in pixels of the picture as it was sent.
        finish: OpenAI's reason why it ended.
        raw: the whole reply as the model wrote it, at its end, where the text is not that.
    """

    index: int
    text: str = ""
    boxes: tuple[dict[str, Any], ...] = ()
    calls: tuple[Call, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: str | None = None
    raw: str | None = None


@dataclass(frozen=True)
class Progress:
    """Stage of a request that has no text yet."""

    stage: str
    fraction: float | None = None
    position: int | None = None

    def json(self) -> dict[str, Any]:
        """Without what is not known."""
        found = {"stage": self.stage, "fraction": self.fraction, "position": self.position}
        return {name: value for name, value in found.items() if value is not None}


class Choice:
    """The reading of one sample's text."""

    def __init__(self, index: int, model: Model, prepared: Prepared) -> None:
        self._index = index
        units = (unit for unit in prepared.request.units if isinstance(unit, VisionUnit))
        pictures = [unit.picture for unit in units if unit.picture is not None]
        self._readable = ReadableReply(model.template.rules.grounding, pictures, prepared.question)
        self._tools = ToolParser() if prepared.tools else None
        self._raw: list[str] = []
        self._called = False

    def feed(self, text: str, logprobs: Sequence[TokenLogprob]) -> Delta:
        """The delta of a piece of text."""
        self._raw.append(text)
        return self._delta(text, tuple(logprobs), None)

    def end(self, reason: str) -> Delta:
        """The delta of the end."""
        return self._delta(None, (), reason)

    @property
    def raw(self) -> str:
        """The whole reply as the model wrote it."""
        return "".join(self._raw)

    def _delta(self, text: str | None, logprobs: tuple[TokenLogprob, ...], reason: str | None) -> Delta:
        parts: list[str | Call] = [] if text is None else [text]
        if self._tools is not None:
            parts = self._tools.finish() if text is None else self._tools.feed(text)
        calls = tuple(part for part in parts if isinstance(part, Call))
        self._called = self._called or bool(calls)
        events: list[Event] = []
        for part in parts:
            if isinstance(part, str):
                events += self._readable.feed(part)
        if text is None:
            events += self._readable.finish()
        shown = "".join(event.text for event in events)
        boxes = tuple(
            {**self._readable.json(event.box), "text": event.text.strip()}
            for event in events
            if event.box is not None
        )
        finish = raw = None
        if reason is not None:
            finish = "tool_calls" if self._called else "length" if reason == "length" else "stop"
            raw = self.raw if self.raw != self._readable.text else None
        return Delta(self._index, shown, boxes, calls, logprobs, finish, raw)


@dataclass
class Generation:
    """One request from its body to its last token; can be iterated over once.

    Attributes:
        usage, timings: in OpenAI's and llama-server's names, complete at the end.
    """

    state: State
    body: ChatRequest
    usage: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, Any] = field(default_factory=dict)
    _ticket: Ticket | None = None
    _prepared: Prepared | None = None
    _started: float = field(default_factory=time.perf_counter)

    async def begin(self) -> None:
        """Prepare the request and queue it, raising the errors that still fit into an HTTP status.

        Raises:
            ApiError, QvlError: see `prepare`; 429 when the queue is full.
        """
        _, worker = self.state.ready()
        if worker.is_full:
            raise self._busy()
        async with _PREPARING:
            self._prepared = await run_in_threadpool(prepare, self.state, self.body)
        try:
            self._ticket = worker.submit(self._prepared.request)
        except QueueFull:
            for sampler in self._prepared.request.samplers:
                sampler.close()
            for path in self._prepared.uploads:
                self.state.uploads.release(path)
            raise self._busy() from None

    def _busy(self) -> ApiError:
        waiting = self.state.options.queue
        return ApiError(429, f"{waiting} requests are waiting already", code="queue_full", retry_after=5)

    async def __aiter__(self) -> AsyncIterator[Delta | Progress]:
        """Deltas and progress, to the end. Leaving early cancels the work."""
        ticket, prepared = self._ticket, self._prepared
        assert ticket is not None and prepared is not None
        model, _ = self.state.ready()
        choices = [Choice(i, model, prepared) for i in range(len(prepared.seeds))]
        first, told = True, None
        try:
            while True:
                update = await ticket.updates.get()
                if update.error is not None:
                    raise update.error
                for index, piece in update.pieces:
                    if first:
                        self.state.metrics.first_token.observe(time.perf_counter() - self._started)
                        first = False
                    yield choices[index].feed(piece.raw, piece.logprobs)
                for index, reason in update.ended:
                    if reason == "cancelled":
                        raise ApiError(503, "the reply was cancelled", code="cancelled")
                    yield choices[index].end(reason)
                if update.done:
                    self._remember(choices)
                    return
                found = _progress(update)
                if found is not None and found != told:
                    yield found
                told = found
        finally:
            ticket.cancel()
            for path in prepared.uploads:
                self.state.uploads.release(path)
            self._count(ticket, prepared)

    def _remember(self, choices: Sequence[Choice]) -> None:
        assert self._ticket is not None and self._ticket.job is not None
        for choice, sample in zip(choices, self._ticket.job.samples, strict=True):
            if sample.tokens:
                self.state.replies.keep(choice.raw, sample.tokens)

    def _count(self, ticket: Ticket, prepared: Prepared) -> None:
        job = ticket.job
        if job is None:
            return
        written = sum(len(sample.tokens) for sample in job.samples)
        self.usage = {
            "prompt_tokens": job.prompt_tokens,
            "completion_tokens": written,
            "total_tokens": job.prompt_tokens + written,
            "prompt_tokens_details": {
                "cached_tokens": job.cached_tokens,
                "image_tokens": prepared.image_tokens,
            },
        }
        read = job.prompt_tokens - job.cached_tokens
        self.timings = {
            "cache_n": job.cached_tokens,
            "prompt_n": read,
            "prompt_ms": round(1000 * job.prefill_seconds, 3),
            "prompt_per_second": _rate(read, job.prefill_seconds),
            "predicted_n": written,
            "predicted_ms": round(1000 * job.generate_seconds, 3),
            "predicted_per_second": _rate(written, job.generate_seconds),
            "encode_ms": round(1000 * job.encode_seconds, 3),
        }
        metrics = self.state.metrics
        for kind, n in (("prompt", job.prompt_tokens), ("cached", job.cached_tokens),
                        ("image", prepared.image_tokens), ("completion", written)):  # fmt: skip
            metrics.tokens.labels(kind).inc(n)
        for kind in ("encode", "prefill", "generate"):
            metrics.seconds.labels(kind).inc(getattr(job, f"{kind}_seconds"))


def _progress(update: Update) -> Progress | None:
    if update.position is not None:
        return Progress("queue", position=update.position)
    return None if update.stage is None else Progress(*update.stage)


def _rate(n: int, seconds: float) -> float:
    return round(n / seconds, 3) if seconds else 0.0
