"""A run over a dataset: pictures in, durable records out, whatever happens to pictures, disk or patience.

The runner knows nothing of models: it hands jobs to a `Captioner` and takes what is done.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, Final, Protocol, TypeAlias

from qvl.runtime.batch import Done, Job
from qvl.runtime.caption.inputs import Item
from qvl.runtime.caption.ledger import Mode
from qvl.runtime.caption.prepare import Ahead, Prepared, Preparer, Rejected
from qvl.runtime.caption.record import Record
from qvl.runtime.caption.settings import image_seed
from qvl.runtime.caption.sidecar import Sidecars
from qvl.runtime.caption.wording import Wording, join
from qvl.runtime.errors import Cancelled

_RESTORE: Final = 1024  # records of which a crash may have kept the sidecar from being written
_WAIT: Final = 0.1
_Result: TypeAlias = tuple[Item, Record]


class Captioner(Protocol):
    """What captions prepared pictures, several at a time (`qvl.runtime.batch.BatchCaptioner`)."""

    @property
    def free(self) -> int:
        """Jobs it would take now."""

    @property
    def busy(self) -> bool:
        """Whether it has jobs that are not done."""

    def submit(self, job: Job) -> None:
        """Take a job."""

    def step(self) -> Sequence[Done]:
        """Do some work; the jobs that it finished. Raises Cancelled when told to stop at once."""


class Results(Protocol):
    """Where records go: `ledger.Ledger`, or `stream.Stream` for stdout."""

    mode: Mode
    crashed: bool

    def is_done(self, path: str) -> bool: ...
    def failed(self, path: str) -> bool | None: ...
    def record(self, path: str) -> Record | None: ...
    def with_content(self, sha256: str, prompt: str) -> Record | None: ...
    def recent(self, n: int) -> list[Record]: ...
    def append(self, records: Sequence[Record]) -> None: ...
    def finish(self) -> None: ...


class Stop:
    """How the user ends a run: asked once, it finishes what is in flight; twice, it stops at once."""

    def __init__(self) -> None:
        self.asked = 0

    def request(self, *_: object) -> None:
        """May be a signal handler."""
        self.asked += 1

    @property
    def soon(self) -> bool:
        return self.asked > 0

    @property
    def now(self) -> bool:
        return self.asked > 1


@dataclass
class Tally:
    """What a run has come to, and where the time went.

    Attributes:
        total: pictures asked for; skipped: done before this run; failed_before: skipped with an error.
        copied: captioned by the caption of a picture with the same content.
        seconds: by stage; decode and preprocess are those of their threads.
    """

    total: int = 0
    skipped: int = 0
    failed_before: int = 0
    done: int = 0
    failed: int = 0
    copied: int = 0
    interrupted: bool = False
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def left(self) -> int:
        return self.total - self.skipped - self.done - self.failed


@dataclass(frozen=True)
class Plan:
    """What a run does.

    Attributes:
        model: name that goes into the records.
        samples: captions of a picture.
        boxes: what a caption points at, given the picture's (width, height).
        threads: that read ahead.
    """

    items: Sequence[Item]
    prepare: Preparer
    model: str
    wording: Wording = field(default_factory=Wording)
    seed: int = 0
    samples: int = 1
    boxes: Callable[[str, tuple[int, int]], tuple[Mapping[str, Any], ...]] | None = None
    sidecars: Sidecars | None = None
    threads: int = 2


class Runner:
    """Captions what a plan names and the results do not have yet.

    Attributes:
        tally: grows as the records come.
    """

    def __init__(self, plan: Plan, captioner: Captioner, results: Results, stop: Stop | None = None) -> None:
        self.plan, self.captioner, self.results = plan, captioner, results
        self.stop = stop or Stop()
        self.tally = Tally(total=len(plan.items))
        self._flying: dict[int, Prepared] = {}
        self._keys = count()
        self._twins: dict[tuple[str, str], list[Prepared]] = {}  # of content and prompt like one in flight
        self._clashes: dict[str, str] = {}

    def run(self) -> Iterator[Record]:
        """Yield each record once it is safe on disk, in the order in which they are done.

        Raises:
            OutputError: the disk is full or fails. All that was yielded is safe.
            Cancelled: told to stop at once.
        """
        if self.plan.sidecars is not None:
            self._clashes = self.plan.sidecars.clashes(self.plan.items)
            if self.results.crashed:
                self.plan.sidecars.restore(self.plan.items, self.results.recent(_RESTORE))
        threads = self.plan.threads
        with closing(Ahead(self._todo(), self.plan.prepare, threads=threads, ahead=2 * threads + 4)) as ahead:
            while not (self.stop.soon or ahead.exhausted) or self.captioner.busy:
                yield from self._keep(self._feed(ahead))
                if self.stop.now:
                    raise Cancelled("stopped at once; what is on disk is whole")
                if self.captioner.busy:
                    yield from self._keep(self._finished(self.captioner.step()))
        self.tally.interrupted = self.stop.soon and self.tally.left > 0
        if not self.tally.interrupted:
            self.results.finish()

    # what to do ------------------------------------------------------------------------------------

    def _todo(self) -> Iterator[Item]:
        for item in self.plan.items:
            if self.stop.soon:
                return
            if self._is_done(item):
                self.tally.skipped += 1
                self.tally.failed_before += bool(self.results.failed(item.path))
            else:
                yield item

    def _is_done(self, item: Item) -> bool:
        done = self.results.is_done(item.path)
        if self.plan.sidecars is None or self.results.mode != "skip" or item.path in self._clashes:
            return done
        # A text file that was deleted is made again; one that others made is kept.
        return bool(self.results.failed(item.path)) or self.plan.sidecars.path(item).exists()

    def _feed(self, ahead: Ahead) -> list[_Result]:
        """Hand prepared pictures to the captioner while it takes them; results of those that need none."""
        results: list[_Result] = []
        while not (self.stop.soon or ahead.exhausted) and self.captioner.free > 0:
            prepared = ahead.take(0 if self.captioner.busy or results else _WAIT)
            if prepared is None:
                break
            if isinstance(prepared, Rejected):
                record = Record(prepared.item.path, error=prepared.reason, sha256=prepared.sha256)
                results.append((prepared.item, record))
            elif known := self._without_model(prepared):
                results.append((prepared.item, known))
        return results

    def _without_model(self, prepared: Prepared) -> Record | None:
        """The record of a picture whose caption is known; None once the picture is under way."""
        item, sidecars = prepared.item, self.plan.sidecars
        self.tally.seconds["decode and preprocess"] += prepared.seconds
        if sidecars is not None and item.path in self._clashes:
            reason = (
                f"{item.path}: its text file, {sidecars.path(item)}, is that of {self._clashes[item.path]}"
            )
            return Record(item.path, error=reason, sha256=prepared.sha256)
        content = (prepared.sha256, prepared.prompt.text)
        if content in self._twins:
            self._twins[content].append(prepared)
            return None
        if self.results.mode not in ("append", "prepend") and (known := self.results.with_content(*content)):
            return replace(known, path=item.path, same_as=known.same_as or known.path, seconds=0.0)
        self._twins[content] = []
        self._flying[key := next(self._keys)] = prepared
        seeds = tuple(image_seed(self.plan.seed, prepared.sha256, i) for i in range(self.plan.samples))
        prompt = prepared.prompt
        self.captioner.submit(Job(key, prepared.frames, item.kind, prompt.before, prompt.after, seeds))
        return None

    # what is done ----------------------------------------------------------------------------------

    def _finished(self, done: Sequence[Done]) -> list[_Result]:
        results: list[_Result] = []
        for outcome in done:
            first = self._flying.pop(outcome.key)
            record = self._record(first, outcome)
            results.append((first.item, record))
            for twin in self._twins.pop((first.sha256, first.prompt.text)):
                same_as = None if record.failed else first.item.path
                results.append(
                    (twin.item, replace(self._record(twin, outcome), same_as=same_as, seconds=0.0))
                )
        return results

    def _record(self, prepared: Prepared, done: Done) -> Record:
        path = prepared.item.path
        if done.error is not None:
            return Record(path, error=f"{path}: {done.error}", sha256=prepared.sha256)
        captions = tuple(self._worded(prepared.item, text) for text in done.texts)
        return Record(
            path,
            caption=captions[0],
            captions=captions if len(captions) > 1 else (),
            prompt=prepared.prompt.text,
            model=self.plan.model,
            prompt_tokens=done.prompt_tokens,
            completion_tokens=done.completion_tokens,
            finish_reason=done.finish_reasons[0],
            seconds=round(done.seconds, 3),
            boxes=self.plan.boxes(captions[0], prepared.size) if self.plan.boxes else (),
            sha256=prepared.sha256,
        )

    def _worded(self, item: Item, text: str) -> str:
        caption, mode = self.plan.wording.caption(text), self.results.mode
        if mode not in ("append", "prepend"):
            return caption
        if self.plan.sidecars is not None:
            return join(self.plan.sidecars.read(item), caption, mode)
        record = self.results.record(item.path)
        return join(record.caption if record else None, caption, mode)

    def _keep(self, results: list[_Result]) -> Iterator[Record]:
        """Make records durable, then report them."""
        if not results:
            return
        started = time.perf_counter()
        self.results.append([record for _, record in results])
        if self.plan.sidecars is not None:
            for item, record in results:
                self.plan.sidecars.write(item, record)
        self.tally.seconds["write"] += time.perf_counter() - started
        for _, record in results:
            self.tally.failed += record.failed
            self.tally.done += not record.failed
            self.tally.copied += record.same_as is not None
            yield record
