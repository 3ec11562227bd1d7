"""Server-sent events, and whole replies with detection of clients that hang up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import StreamingResponse

from qvl.runtime.files import as_json
from qvl.runtime.serve.errors import ApiError, body_of, from_error
from qvl.runtime.serve.generation import Delta, Generation
from qvl.runtime.serve.state import State


def event(data: dict[str, Any], name: str | None = None) -> str:
    """A server-sent event."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {as_json(data, compact=True)}\n\n"


class Events(StreamingResponse):
    """A stream of events. An error in mid-stream is an event too: the status has been sent."""

    def __init__(self, events: AsyncIterator[str], route: str, state: State) -> None:
        super().__init__(_told(events, route, state), media_type="text/event-stream")
        self.headers["Cache-Control"] = "no-store"
        self.headers["X-Accel-Buffering"] = "no"


async def _told(events: AsyncIterator[str], route: str, state: State) -> AsyncIterator[str]:
    outcome = "cancelled"
    try:
        async for each in events:
            yield each
        outcome = "done"
    except Exception as e:
        outcome = "failed"
        error = from_error(e)
        body = body_of(error.status, str(error), error.code, error.param)
        yield event({"error": {**body["error"], "code": error.code or error.status}})
    finally:
        state.metrics.requests.labels(route, outcome).inc()


async def collect(generation: Generation, request: Request, route: str, state: State) -> list[Delta]:
    """All deltas of a reply; the work is cancelled when the client hangs up.

    Raises:
        ApiError, QvlError: the reply failed.
    """

    async def read() -> list[Delta]:
        return [found async for found in generation if isinstance(found, Delta)]

    async def gone() -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(0.25)

    reading, leaving = asyncio.ensure_future(read()), asyncio.ensure_future(gone())
    outcome = "failed"
    try:
        await asyncio.wait({reading, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():
            outcome = "cancelled"
            raise ApiError(499, "the client hung up", code="cancelled")
        deltas = reading.result()
        outcome = "done"
        return deltas
    except asyncio.CancelledError:  # uvicorn's patience has ended
        raise ApiError(503, "the server is stopping", code="stopping") from None
    finally:
        for task in (reading, leaving):
            task.cancel()
        await asyncio.gather(reading, leaving, return_exceptions=True)
        state.metrics.requests.labels(route, outcome).inc()
