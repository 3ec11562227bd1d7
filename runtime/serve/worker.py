"""The thread that steps the engine, and its updates for the event loop."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field

from qvl.runtime.engine.engine import Engine
from qvl.runtime.engine.reply import FinishReason, Piece
from qvl.runtime.engine.request import Job, Request
from qvl.runtime.errors import Cancelled

log = logging.getLogger("qvl.serve")


@dataclass(frozen=True)
class Update:
    """Outcome of a step for one request.

    Attributes:
        pieces: of each sample by its number.
        ended: samples that have ended, with the reason.
        stage: what the engine is at ("encode", "prefill"), and the fraction done.
        position: requests before this one that wait too; None once it has begun.
        done: nothing more will come.
    """

    pieces: tuple[tuple[int, Piece], ...] = ()
    ended: tuple[tuple[int, FinishReason], ...] = ()
    stage: tuple[str, float] | None = None
    position: int | None = None
    done: bool = False
    error: BaseException | None = None


@dataclass(eq=False)
class Ticket:
    """A queued or running request; the event loop reads its updates."""

    request: Request
    loop: asyncio.AbstractEventLoop
    updates: asyncio.Queue[Update] = field(default_factory=asyncio.Queue)
    job: Job | None = None
    cancelled: bool = False
    told: tuple[tuple[str, float] | None, int | None] = (None, None)
    over: set[int] = field(default_factory=set)

    def cancel(self) -> None:
        """Stop at the next step; any thread may ask."""
        self.cancelled = True
        if self.job is not None:
            self.job.cancel()

    def tell(self, update: Update) -> None:
        """Hand an update to the event loop; one that has closed is left alone."""
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.updates.put_nowait, update)


class QueueFull(Exception):
    """The queue is at its bound."""


class Worker:
    """Steps an engine in its own thread while there is work.

    Args:
        engine: owned by the worker, which closes it.
        queue: requests that may wait beyond the engine's slots.
    """

    def __init__(self, engine: Engine, parallel: int, queue: int) -> None:
        self._engine = engine
        self._most = parallel + queue
        self._news = threading.Condition()
        self._coming: deque[Ticket] = deque()
        self._active: list[Ticket] = []
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="qvl-engine", daemon=True)
        self._thread.start()

    @property
    def n_active(self) -> int:
        """Requests that are waiting or under way."""
        return len(self._active) + len(self._coming)

    @property
    def is_full(self) -> bool:
        """True when the next request would be refused."""
        return self.n_active >= self._most

    @property
    def is_alive(self) -> bool:
        """True while requests are taken."""
        return self._thread.is_alive() and not self._stopping

    def submit(self, request: Request) -> Ticket:
        """Take a request; call it in the event loop that will read its updates.

        Raises:
            QueueFull: too many wait. Cancelled: the server is stopping.
        """
        ticket = Ticket(request, asyncio.get_running_loop())
        with self._news:
            if not self.is_alive:
                raise Cancelled("the server is stopping")
            if self.is_full:
                raise QueueFull
            self._coming.append(ticket)
            self._news.notify()
        return ticket

    def close(self, patience: float) -> None:
        """Finish what is under way, for `patience` seconds at most, then cancel it; free the engine."""
        with self._news:
            self._stopping = True
            self._news.notify()
        self._thread.join(patience)
        if self._thread.is_alive():
            for ticket in [*self._coming, *self._active]:
                ticket.cancel()
            self._thread.join(5.0)
        if not self._thread.is_alive():
            self._engine.close()

    def _run(self) -> None:
        while True:
            with self._news:
                while not (self._coming or self._active or self._stopping):
                    self._news.wait()
                if self._stopping and not (self._coming or self._active):
                    return
                coming = list(self._coming)
                self._active.extend(coming)
                self._coming.clear()
            for ticket in coming:
                self._begin(ticket)
            try:
                self._engine.step()
            except BaseException as e:  # also what no code expects: every client is told, the server lives on
                log.error("the engine failed", exc_info=e)
                self._fail(e)
            self._tell()

    def _begin(self, ticket: Ticket) -> None:
        try:
            ticket.job = self._engine.submit(ticket.request)
        except Exception as e:
            self._active.remove(ticket)
            ticket.tell(Update(done=True, error=e))
            return
        if ticket.cancelled:
            ticket.job.cancel()

    def _fail(self, error: BaseException) -> None:
        for ticket in self._active:
            if ticket.job is not None and not ticket.job.done:
                ticket.cancel()
                ticket.tell(Update(done=True, error=error))
        self._active = [ticket for ticket in self._active if ticket.job is not None and ticket.job.done]

    def _tell(self) -> None:
        waiting = 0
        for ticket in list(self._active):
            job = ticket.job
            assert job is not None
            pieces = []
            for i, sample in enumerate(job.samples):
                while sample.pieces:
                    pieces.append((i, sample.pieces.popleft()))
            ended = tuple(
                (i, sample.reason)
                for i, sample in enumerate(job.samples)
                if sample.reason is not None and i not in ticket.over
            )
            ticket.over.update(i for i, _ in ended)
            stage = ticket.told[0]
            while job.progress:
                stage = job.progress.popleft()
            position = waiting if stage is None and not (job.started or job.done) else None
            waiting += position is not None
            news = (stage, position)
            if pieces or ended or job.done or news != ticket.told:
                ticket.told = news
                ticket.tell(Update(tuple(pieces), ended, stage, position, job.done, job.error))
            if job.done:
                self._active.remove(ticket)
