"""A reply while it is made."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from qvl.runtime.engine.reply import FinishReason, Reply, Timings, Usage
from qvl.runtime.engine.request import Job
from qvl.runtime.engine.units import VisionUnit, n_vision_cells
from qvl.runtime.grounding.readable import ReadableReply


@dataclass(eq=False)
class Draft:
    """A reply under way, which becomes a `Reply`.

    Attributes:
        read_seconds: spent on the messages before there was a job.
        job: the engine's; None while the messages are read.
        readable: the reply as people read it, as far as the stream was read.
    """

    cancelled: threading.Event = field(default_factory=threading.Event)
    seed: int | None = None
    dropped_messages: int = 0
    read_seconds: float = 0.0
    job: Job | None = None
    readable: ReadableReply | None = None

    def cancel(self) -> None:
        """End it at the next step."""
        self.cancelled.set()

    def reply(self, reason: FinishReason) -> Reply:
        """The reply as it stands."""
        job = self.job
        if job is None or self.readable is None:
            return Reply("", (), reason, seed=self.seed, dropped_messages=self.dropped_messages)
        pictures = [unit for unit in job.request.units if isinstance(unit, VisionUnit)]
        [sample] = job.samples
        readable = self.readable
        readable.feed(sample.text[len(readable.raw) :])
        readable.finish()
        return Reply(
            readable.text,
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
            readable.raw,
            tuple(readable.boxes),
            tuple(readable.problems),
        )
