"""State that all routes share: the model, its worker, the settings, the counters."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from qvl.runtime.detail.bounds import Bounds, Detail
from qvl.runtime.serve.errors import ApiError
from qvl.runtime.serve.metrics import Metrics
from qvl.runtime.serve.options import ServeOptions
from qvl.runtime.serve.uploads import Uploads
from qvl.runtime.serve.worker import Worker

if TYPE_CHECKING:
    from qvl.runtime.detail.estimator import Estimator
    from qvl.runtime.model import Model

_MOST_REPLIES: Final = 1024


class Replies:
    """Tokens of replies by their text, so that the next turn's prompt begins with the same tokens."""

    def __init__(self) -> None:
        self._found: OrderedDict[str, tuple[int, ...]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, text: str) -> Sequence[int] | None:
        """The tokens that made a text; None if it is not known."""
        with self._lock:
            return self._found.get(text)

    def keep(self, text: str, tokens: Sequence[int]) -> None:
        """Remember a reply; the oldest goes when there are many."""
        with self._lock:
            self._found[text] = tuple(tokens)
            self._found.move_to_end(text)
            if len(self._found) > _MOST_REPLIES:
                self._found.popitem(last=False)


@dataclass
class State:
    """A running server.

    Attributes:
        model, worker, costs: None until the model is loaded.
        name: of the model, as clients see it.
    """

    options: ServeOptions
    name: str = ""
    model: Model | None = None
    costs: Estimator | None = None
    worker: Worker | None = None
    metrics: Metrics = field(default_factory=Metrics)
    replies: Replies = field(default_factory=Replies)
    uploads: Uploads = field(default_factory=Uploads)
    created: int = field(default_factory=lambda: int(time.time()))
    _auto: int | None = None

    def max_pixels(self, detail: Detail) -> int:
        """The bound on a picture's area that a detail stands for.

        That of "auto" stays once the throughput has been measured: a picture of an earlier turn keeps its
        size, and with it what is cached of it.
        """
        assert self.costs is not None
        if detail != "auto":
            return self.costs.preprocessor(Bounds(detail=detail)).max_pixels
        if self._auto is not None:
            return self._auto
        found = self.costs.preprocessor(Bounds(detail="auto")).max_pixels
        if self.costs.throughput.measured:
            self._auto = found
        return found

    def ready(self) -> tuple[Model, Worker]:
        """The model and its worker.

        Raises:
            ApiError: 503 while the model loads or the server stops.
        """
        if self.model is None or self.worker is None:
            raise ApiError(503, "the model is loading", code="loading", retry_after=2)
        if not self.worker.is_alive:
            raise ApiError(503, "the server is stopping", code="stopping")
        return self.model, self.worker
