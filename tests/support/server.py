"""A server in this process, on a free port."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from qvl.runtime import load
from qvl.runtime.serve.app import attach, build
from qvl.runtime.serve.options import ServeOptions
from qvl.runtime.serve.state import State

SAMPLES = Path(__file__).parents[2] / "models" / "samples"


@dataclass
class Running:
    """A server under test.

    Attributes:
        url: its address, without a slash at the end.
        pause: seconds that every step of the engine takes longer.
    """

    url: str
    state: State
    pause: float = 0.0


@contextmanager
def running(n_ctx: int = 4096, path: Path | None = None, **options: Any) -> Iterator[Running]:
    """Serve a model, by default the embedded one, with these `ServeOptions` until the block ends."""
    app = build(ServeOptions(port=0, **options))
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="on")
    socket = config.bind_socket()
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]}, daemon=True)
    with load(path, n_ctx=n_ctx) as model:
        attach(app, model, "nano")
        thread.start()
        while not server.started:
            time.sleep(0.01)
        found = Running(f"http://127.0.0.1:{socket.getsockname()[1]}", app.state.qvl)
        worker = app.state.qvl.worker
        step = worker._engine.step

        def slowed(*args: Any) -> Any:
            time.sleep(found.pause)
            return step(*args)

        worker._engine.step = slowed  # of this server alone: several may run in one process
        try:
            yield found
        finally:
            server.should_exit = True
            thread.join(15)
            assert not thread.is_alive()


def data_url(name: str, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode((SAMPLES / name).read_bytes()).decode()}"


def picture(name: str, **extra: object) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": data_url(name)}, **extra}


def asked(text: str, *names: str) -> dict[str, object]:
    return {"role": "user", "content": [*map(picture, names), {"type": "text", "text": text}]}
