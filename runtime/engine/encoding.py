"""Encodes the pictures that jobs wait for, a few layers at a time."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qvl.runtime.engine.units import Unit, VisionUnit

if TYPE_CHECKING:
    from qvl.runtime.engine.request import Job

_SLICE_SECONDS: Final = 0.2


@dataclass(frozen=True)
class Encoded:
    """Embeddings by the key of their unit.

    Attributes:
        vectors: float32 [n_tokens, n_embd] each.
        made: keys of those that were not found, but made.
    """

    vectors: Mapping[str, NDArray[np.float32]]
    made: frozenset[str] = field(default_factory=frozenset)


EncodingSteps: TypeAlias = Generator[float, None, Encoded]
"""Yields the fraction done whenever it can be left for other work; closing it stops the encoding."""


class Embedder(Protocol):
    """Makes embeddings (`qvl.runtime.engine.store.EmbeddingStore`)."""

    def encode_steps(self, units: Sequence[VisionUnit]) -> EncodingSteps:
        """Embeddings of units, each of them once."""


class Encodings:
    """Embeddings that jobs wait for, and those they have yet to read.

    Attributes:
        vectors: embeddings by the key of their unit.
        share: fraction done of the pictures in the encoder; None when there are none.
    """

    def __init__(self, embedder: Embedder) -> None:
        self.vectors: dict[str, NDArray[np.float32]] = {}
        self.share: float | None = None
        self._embedder = embedder
        self._steps: EncodingSteps | None = None
        self._jobs: list[Job] = []
        self._one_by_one = False

    def advance(
        self, wanted: Mapping[Job, Sequence[VisionUnit]]
    ) -> tuple[float, list[tuple[Job, Exception]]]:
        """Work for `_SLICE_SECONDS`, twice that where several jobs wait, or a node that takes longer.

        Args:
            wanted: the units that each job has to read.

        Returns:
            The seconds spent, and the jobs whose pictures failed, with the reason.
        """
        if self._steps is not None and not any(job in wanted for job in self._jobs):
            self.close()
        if self._steps is None and not self._begin(wanted):
            return 0.0, []
        assert self._steps is not None
        started = time.perf_counter()
        failed: list[tuple[Job, Exception]] = []
        enough = _SLICE_SECONDS * min(2, len(wanted))
        try:
            while time.perf_counter() - started < enough:
                self.share = next(self._steps)
        except StopIteration as end:
            self._finish(end.value)
        except Exception as e:
            if len(self._jobs) == 1:
                failed = [(self._jobs[0], e)]
            self._one_by_one = len(self._jobs) > 1  # to find out whose picture it is
            self.close()
        seconds = time.perf_counter() - started
        for job in self._jobs:
            job.encode_seconds += seconds
            job.progress.append(("encode", 1.0 if self.share is None else self.share))
        if self.share is None:
            self._jobs = []
        return seconds, failed

    def _begin(self, wanted: Mapping[Job, Sequence[VisionUnit]]) -> bool:
        units: dict[str, VisionUnit] = {}
        self._jobs = []
        for job, some in wanted.items():
            missing = {unit.key: unit for unit in some if unit.key not in self.vectors}
            if missing and not (self._one_by_one and self._jobs):
                units |= {key: unit for key, unit in missing.items() if key not in units}
                self._jobs.append(job)
        if not units:
            self._one_by_one = False
            return False
        self._steps, self.share = self._embedder.encode_steps(list(units.values())), 0.0
        return True

    def _finish(self, encoded: Encoded) -> None:
        self.vectors.update(encoded.vectors)
        made = set(encoded.made)
        for job in self._jobs:
            job.images_encoded += len(made & job.pictures)
            made -= job.pictures
        self._steps, self.share = None, None

    def keep(self, units: Iterable[Unit]) -> None:
        """Free all embeddings but those of these units."""
        keys = {unit.key for unit in units if isinstance(unit, VisionUnit)}
        for key in [key for key in self.vectors if key not in keys]:
            del self.vectors[key]

    def close(self) -> None:
        """Stop the encoding under way."""
        if self._steps is not None:
            self._steps.close()
        self._steps, self.share = None, None
