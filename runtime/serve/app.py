"""The application: routes, guards, the page, and the life of the model behind them."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import FileResponse
from starlette.staticfiles import StaticFiles

from qvl.runtime.detail.estimator import Estimator
from qvl.runtime.engine.engine import Engine
from qvl.runtime.model import Model
from qvl.runtime.serve import chat, errors, info, responses
from qvl.runtime.serve.guard import Guard
from qvl.runtime.serve.options import ServeOptions
from qvl.runtime.serve.state import State
from qvl.runtime.serve.worker import Worker

HERE: Final = Path(__file__).parent
PATIENCE: Final = 8.0  # seconds that requests under way have at the end; the server is gone in ten
_N_BATCH: Final = 512


def build(options: ServeOptions) -> FastAPI:
    """The application without a model; `attach` gives it one. `/health` answers 503 until then."""
    state = State(options)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        if state.worker is not None:
            state.worker.close(0.0)  # uvicorn has waited for the requests by now
        state.uploads.close()

    app = FastAPI(title="qvl", docs_url=None, redoc_url=None, lifespan=life, description=__doc__)
    app.state.qvl = state
    errors.install(app)
    for router in (chat.router, responses.router, info.router):
        app.include_router(router)
    if options.cors:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(options.cors), allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(Guard, options=options)
    _pages(app)
    return app


def _pages(app: FastAPI) -> None:
    app.mount("/page", StaticFiles(directory=HERE / "page", follow_symlink=True), name="page")
    app.mount("/docs/static", StaticFiles(directory=HERE / "docs", follow_symlink=True), name="docs")

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(HERE / "page" / "index.html", headers={"Cache-Control": "no-cache"})

    @app.get("/docs", include_in_schema=False)
    async def docs() -> FileResponse:
        return FileResponse(HERE / "docs" / "index.html")


def attach(app: FastAPI, model: Model, name: str) -> None:
    """Serve a model from now on. The caller closes it after the application has ended."""
    state: State = app.state.qvl
    parallel = state.options.parallel
    context = model.context(n_ctx=model.n_ctx, n_batch=_N_BATCH, n_seq_max=parallel)
    state.name = name
    state.model = model
    state.costs = Estimator(model, n_ctx=model.n_ctx, refine=True)
    state.worker = Worker(Engine(context, model.store), parallel, state.options.queue)


def _listening(options: ServeOptions) -> socket.socket:
    """Bind and listen, so that early clients wait for the model instead of being refused.

    Raises:
        OSError: the address is in use, not this machine's, or not to be had.
    """
    found = socket.socket(socket.AF_INET6 if ":" in options.host else socket.AF_INET)
    try:
        if os.name == "posix":  # on Windows it would let two programs share the port
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((options.host, options.port))
        found.listen()
    except BaseException:
        found.close()
        raise
    return found


def serve(
    options: ServeOptions,
    load: Callable[[], tuple[Model, str]],
    *,
    announce: Callable[[str], None],
    failed: Callable[[BaseException], None],
) -> None:
    """Listen, load the model in a thread meanwhile, and serve until SIGINT or SIGTERM.

    Args:
        load: gives the model and its name; called in a thread.
        announce: told the address to open, once the server listens.
        failed: told why the model could not be loaded; the server then ends.

    Raises:
        OSError: the address cannot be listened on.
    """
    import uvicorn

    app = build(options)
    config: dict[str, Any] = {"log_level": "warning", "access_log": False, "lifespan": "on"}
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=options.host,
            port=options.port,
            timeout_graceful_shutdown=int(PATIENCE),
            server_header=False,
            **config,
        )
    )
    loaded: list[Model] = []

    def work() -> None:
        try:
            model, name = load()
            loaded.append(model)
            attach(app, model, name)
        except BaseException as e:
            failed(e)
            server.should_exit = True

    sockets = [_listening(options)]
    host = f"[{options.host}]" if ":" in options.host else options.host
    announce(f"http://{host}:{sockets[0].getsockname()[1]}/")
    thread = threading.Thread(target=work, name="qvl-load", daemon=True)
    thread.start()
    try:
        server.run(sockets=sockets)
    finally:
        for model in loaded:
            model.close()
