"""A run over a dataset: pictures in, durable records out, whatever happens to pictures, disk or patience.

The runner knows nothing of models: it hands jobs to a `Captioner` and takes what is done.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Final, Protocol

from qvl.runtime.caption.assemble import Wording, readable
from qvl.runtime.caption.bookkeeping import Book, Result, Results, Stop
from qvl.runtime.caption.captioner import CaptionJob, Done
from qvl.runtime.caption.inputs import Item
from qvl.runtime.caption.prepare import Prefetcher, PreparedPicture, Preparer, Rejected
from qvl.runtime.caption.record import Record
from qvl.runtime.caption.settings import image_seed
from qvl.runtime.caption.sidecar import Sidecars
from qvl.runtime.errors import Cancelled
from qvl.runtime.grounding.readable import read_reply
from qvl.runtime.grounding.tags import GroundingParser
from qvl.runtime.prompt.rules import ParserFactory
from qvl.runtime.vision.size import PictureInfo

_WAIT: Final = 0.1
_AHEAD: Final = 6


class Captioner(Protocol):
    """Captions prepared pictures, several at a time; see `qvl.runtime.caption.captioner.BatchCaptioner`."""

    @property
    def free(self) -> int:
        """Jobs it would take now."""

    @property
    def busy(self) -> bool:
        """True while it has jobs that are not done."""

    def submit(self, job: CaptionJob) -> None:
        """Take a job."""

    def step(self) -> Sequence[Done]:
        """Do some work; the jobs that it finished. Raises Cancelled when told to stop at once."""


@dataclass(frozen=True)
class Plan:
    """A run: pictures, how to read and caption them, and the words around the captions.

    Attributes:
        model: name that goes into the records.
        samples: captions of a picture.
        grounding: makes the parser of the model's family for boxes in captions.
        json: captions are to be JSON, and one that is cut before its end is a failure.
        threads: that read ahead.
    """

    items: Sequence[Item]
    prepare: Preparer
    model: str
    wording: Wording = field(default_factory=Wording)
    seed: int = 0
    samples: int = 1
    grounding: ParserFactory = GroundingParser
    json: bool = False
    sidecars: Sidecars | None = None
    threads: int = 2


class Runner(Book):
    """Captions what a plan names and the results do not have yet."""

    def __init__(self, plan: Plan, captioner: Captioner, results: Results, stop: Stop | None = None) -> None:
        super().__init__(plan.items, results, plan.sidecars, stop)
        self.plan, self.captioner = plan, captioner
        self.activity = plan.prepare.activity
        self._flying: dict[int, PreparedPicture] = {}
        self._keys = count()
        self._duplicates: dict[tuple[str, str], list[PreparedPicture]] = {}  # by content and prompt

    def run(self) -> Iterator[Record]:
        """Yield each record once it is safe on disk, in the order in which they are done.

        Raises:
            OutputError: the disk is full or fails. All that was yielded is safe.
            Cancelled: told to stop at once.
        """
        n_ahead = self.plan.threads + max(_AHEAD, self.captioner.free)
        self.activity.closed = False
        with closing(Prefetcher(self.todo(), self.plan.prepare, self.plan.threads, n_ahead)) as ahead:
            try:
                while not (self.stop.soon or ahead.exhausted) or self.captioner.busy:
                    yield from self.keep(self._feed(ahead))
                    if self.stop.now:
                        raise Cancelled("stopped at once; what is on disk is whole")
                    if self.captioner.busy:
                        yield from self.keep(self._finished(self.captioner.step()))
            finally:
                self.activity.closed = True  # what is still being read ahead will not be used
        self.finish()

    def _feed(self, ahead: Prefetcher) -> list[Result]:
        """Hand prepared pictures to the captioner while it takes them; results of those that need none."""
        results: list[Result] = []
        # With nothing under way, a moment's wait lets the first pictures start together.
        wait = 0.0 if self.captioner.busy else _WAIT
        while not (self.stop.soon or ahead.exhausted) and self.captioner.free > 0:
            prepared = ahead.take(0.0 if results else wait)
            if prepared is None:
                break
            if isinstance(prepared, Rejected):
                record = Record(prepared.item.path, error=prepared.reason, sha256=prepared.sha256)
                results.append((prepared.item, record))
            elif known := self._without_model(prepared):
                results.append((prepared.item, known))
        return results

    def _without_model(self, prepared: PreparedPicture) -> Record | None:
        """The record of a picture whose caption is known; None once the picture is under way."""
        item = prepared.item
        self.tally.seconds["decode and preprocess"] += prepared.seconds
        if refused := self.refused(item):
            return refused
        content = (prepared.sha256, prepared.prompt.text)
        if content in self._duplicates:
            self._duplicates[content].append(prepared)
            return None
        if self.results.mode not in ("append", "prepend") and (known := self.results.with_content(*content)):
            same_as = known.same_as or known.path
            return replace(readable(known), path=item.path, same_as=same_as, seconds=0.0)
        self._duplicates[content] = []
        self._flying[key := next(self._keys)] = prepared
        seeds = tuple(image_seed(self.plan.seed, prepared.sha256, i) for i in range(self.plan.samples))
        prompt = prepared.prompt
        self.captioner.submit(
            CaptionJob(
                key, prepared.frames, item.kind, prompt.before, prompt.after, seeds,
                prepared.times, prepared.fps,
            )
        )  # fmt: skip
        return None

    # what is done ----------------------------------------------------------------------------------

    def _finished(self, done: Sequence[Done]) -> list[Result]:
        results: list[Result] = []
        for outcome in done:
            first = self._flying.pop(outcome.key)
            record = self._record(first, outcome)
            results.append((first.item, record))
            for duplicate in self._duplicates.pop((first.sha256, first.prompt.text)):
                same_as = None if record.failed else first.item.path
                results.append(
                    (duplicate.item, replace(self._record(duplicate, outcome), same_as=same_as, seconds=0.0))
                )
        return results

    def _record(self, prepared: PreparedPicture, done: Done) -> Record:
        path, wording = prepared.item.path, self.plan.wording
        if done.error is not None:
            return Record(path, error=f"{path}: {done.error}", sha256=prepared.sha256)
        said = [wording.start + text for text in done.texts]
        if self.plan.json and not all(map(_is_json, said)):
            what = f"no whole JSON in {done.completion_tokens // len(done.texts)} tokens: raise `max_tokens`"
            return Record(path, error=f"{path}: {what}", sha256=prepared.sha256)
        height, width = prepared.frames.shape[1:3]
        picture = PictureInfo(prepared.size, (width, height))
        first, *others = (read_reply(text, self.plan.grounding, [picture]) for text in said)
        captions = tuple(wording.caption(reply.text) for reply in (first, *others))
        record = Record(
            path,
            caption=captions[0],
            captions=captions if len(captions) > 1 else (),
            prompt=prepared.prompt.text,
            model=self.plan.model,
            prompt_tokens=done.prompt_tokens,
            completion_tokens=done.completion_tokens,
            finish_reason=done.finish_reasons[0],
            seconds=round(done.seconds, 3),
            boxes=tuple({name: box[name] for name in box if name != "picture"} for box in first.boxes),
            sha256=prepared.sha256,
            raw=first.raw if first.raw != first.text else None,
        )
        return self.joined(prepared.item, record)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
