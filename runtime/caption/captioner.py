"""Prepared pictures to requests, and replies to captions: the runner's side of the engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from types import TracebackType
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from qvl.runtime.caption.activity import Activity
from qvl.runtime.engine.engine import Engine
from qvl.runtime.engine.place import placed
from qvl.runtime.engine.request import Job, Request
from qvl.runtime.engine.units import Unit, VisionUnit, n_vision_cells
from qvl.runtime.errors import Cancelled
from qvl.runtime.llama.sampler import Sampler, Sampling
from qvl.runtime.llama.vocab import Vocab
from qvl.runtime.prompt.chatml import ChatTemplate
from qvl.runtime.prompt.messages import Turn, VisionChunk
from qvl.runtime.prompt.rules import Vision
from qvl.runtime.vision.preprocess import Preprocessor

_ENCODING: Final = "encoding"


@dataclass(frozen=True)
class CaptionJob:
    """A prepared picture with its prompt.

    Attributes:
        key: the caller's, returned with the result.
        frames: uint8 [n, h, w, 3], resized to the encoder's size.
        seconds, fps: of a video: the time of each frame, and how many were taken of each second.
        before, after: the user's words before and after the picture.
        seeds: one for each sample.
    """

    key: int
    frames: NDArray[np.uint8]
    kind: Literal["image", "video"]
    before: str
    after: str
    seeds: tuple[int, ...]
    seconds: tuple[float, ...] = ()
    fps: float = 2.0


@dataclass(frozen=True)
class Done:
    """The outcome of a job.

    Attributes:
        texts, finish_reasons: one for each sample.
        prompt_tokens: KV cells of the prompt; completion_tokens: of all samples.
        error: why there is no text.
    """

    key: int
    texts: tuple[str, ...] = ()
    finish_reasons: tuple[str, ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    error: str | None = None


@dataclass(frozen=True)
class CaptionRequest:
    """Settings that all jobs of a run share.

    Attributes:
        start: words that begin every reply; the model goes on from them.
        grammar: GBNF that what follows must fit.
    """

    system: str | None = None
    start: str = ""
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 256
    grammar: str | None = None


class BatchCaptioner:
    """Captions pictures in the slots of an engine. Use as a context manager, or call `close`.

    Args:
        engine: belongs to the captioner from now on; has a slot for each sample.
        cancelled: asked during long work; when true, `step` raises Cancelled.
        activity: told how far the encoder is.
        n_trained: tokens of the longest context that the model was trained on.

    Attributes:
        seconds: spent in encode, prefill and generate.
    """

    def __init__(
        self,
        engine: Engine,
        vocab: Vocab,
        template: ChatTemplate,
        preprocessor: Preprocessor,
        request: CaptionRequest,
        *,
        cancelled: Callable[[], bool] | None = None,
        activity: Activity | None = None,
        n_trained: int = 1 << 30,
    ) -> None:
        self.request = request
        self.seconds = engine.seconds
        self._engine, self._vocab, self._template = engine, vocab, template
        self._preprocessor, self._n_trained = preprocessor, n_trained
        self._activity = activity or Activity()
        self._cancelled = cancelled or (lambda: False)
        self._start = vocab.tokenize(request.start)
        # a job's key is unique in its run, and runs follow each other on one captioner
        self._pictures = count()
        self._jobs: dict[Job, tuple[CaptionJob, float]] = {}
        self._failed: list[Done] = []

    @property
    def free(self) -> int:
        """Jobs it would take now; none while pictures are encoded, which come first."""
        return 0 if self._engine.encoding is not None else self._engine.free

    @property
    def busy(self) -> bool:
        """True while it has jobs that are not done."""
        return bool(self._jobs or self._failed)

    def submit(self, job: CaptionJob) -> None:
        """Take a job. One that cannot fit the context comes back as failed at the next step."""
        units = self._units(job)
        n_prompt = sum(1 if isinstance(unit, int) else unit.span.n_tokens for unit in units)
        cells = n_prompt + len(job.seeds) * self.request.max_tokens
        if cells > self._engine.n_ctx:
            self._failed.append(Done(job.key, error=self._too_large(job, n_vision_cells(units), cells)))
            return
        sampling = self.request.sampling
        request = Request(
            units,
            tuple(
                Sampler(self._vocab, replace(sampling, seed=seed), self.request.grammar) for seed in job.seeds
            ),
            self.request.max_tokens,
            keep=next(i for i, unit in enumerate(units) if isinstance(unit, VisionUnit)),
        )
        self._jobs[self._engine.submit(request)] = (job, time.perf_counter())

    def step(self) -> list[Done]:
        """Do some work: the pictures of new jobs first, then a token of every reply.

        Raises:
            Cancelled: asked to stop. QvlError: the model failed.
        """
        done, self._failed = self._failed, []
        ended = self._engine.step(self._cancelled)
        if (share := self._engine.encoding) is not None:
            self._activity.at(_ENCODING, share)
        else:
            self._activity.over(_ENCODING)
        if self._cancelled():
            raise Cancelled("stopped at once")
        for job in ended:
            if job.error is not None:
                raise job.error
            done.append(self._done(job, *self._jobs.pop(job)))
        return done

    def close(self) -> None:
        """Free the context and what is under way."""
        self._engine.close()
        self._jobs.clear()

    def __enter__(self) -> BatchCaptioner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def _units(self, job: CaptionJob) -> list[Unit]:
        """The prompt, with the picture as it was prepared."""
        content = [part for part in (job.before, VisionChunk(job.kind, job.key), job.after) if part]
        turns = [Turn.of("user", content)]
        if self.request.system is not None:
            turns.insert(0, Turn.of("system", self.request.system))
        return [*self._template.units(turns, lambda _: self._place(job)), *self._start]

    def _place(self, job: CaptionJob) -> list[str | VisionUnit]:
        preprocessor = self._preprocessor
        pairs = -(-len(job.frames) // preprocessor.temporal_patch_size)
        height, width = (size // preprocessor.factor for size in job.frames.shape[1:3])
        vision = Vision(job.kind, (pairs, height, width), job.seconds, job.fps)
        source = partial(preprocessor.patchify, job.frames)
        return placed(self._template.rules.layout, vision, f"{next(self._pictures)}", source)

    def _done(self, job: Job, asked: CaptionJob, started: float) -> Done:
        return Done(
            asked.key,
            tuple(self._vocab.text(sample.tokens) for sample in job.samples),
            tuple(sample.reason or "stop" for sample in job.samples),
            job.prompt_tokens,
            sum(len(sample.tokens) for sample in job.samples),
            time.perf_counter() - started,
        )

    def _too_large(self, job: CaptionJob, n: int, cells: int) -> str:
        n_ctx = self._engine.n_ctx
        area = (n_ctx - (cells - n)) * self._preprocessor.token_pixels
        ways = [f"`max_pixels` {area} would fit"] if area > 0 else []
        if cells <= self._n_trained or not ways:
            ways.append(f"a context (`n_ctx`) of {cells} would do")
        return (
            f"the {job.kind} with its words and replies takes {cells} tokens ({n} of them its own), "
            f"the context holds {n_ctx}: {', or '.join(ways)}"
        )
