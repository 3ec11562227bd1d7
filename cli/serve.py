"""`qvl serve`: OpenAI's HTTP API and a page, on this machine."""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qvl.cli import options
from qvl.cli.output import Output
from qvl.runtime.errors import InputError, OutputError, QvlError
from qvl.runtime.files import expanded

if TYPE_CHECKING:
    from qvl.runtime.model import Model

Host = Annotated[str, typer.Option("--host", metavar="ADDRESS", help="Address to listen on.")]
Port = Annotated[
    int, typer.Option("--port", metavar="N", min=0, max=65535, help="Port to listen on; 0 takes a free one.")
]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", metavar="KEY", help="Ask for this key. Default: QVL_API_KEY, else none."),
]
Parallel = Annotated[
    int, typer.Option("--parallel", metavar="N", min=1, max=256, help="Replies generated at the same time.")
]
Queue = Annotated[
    int, typer.Option("--queue", metavar="N", min=0, max=100_000, help="Requests that may wait in the queue.")
]
MediaPath = Annotated[
    Path | None,
    typer.Option("--media-path", metavar="DIR", help="Let file:// addresses name files below this folder."),
]
Cors = Annotated[
    list[str] | None,
    typer.Option(
        "--cors", metavar="ORIGIN", help="Allow requests from pages of this origin; can be repeated."
    ),
]


@options.grouped
def serve(
    *,
    host: Host = "127.0.0.1",
    port: Port = 8080,
    api_key: ApiKey = None,
    parallel: Parallel = 4,
    queue: Queue = 32,
    media_path: MediaPath = None,
    cors: Cors = None,
    model: options.ModelOptions,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Serve a model over HTTP.

    The first line printed is the address of the page. Programs that speak OpenAI's API use that address
    with /v1 at its end.
    """
    try:
        from qvl.runtime.serve.app import serve as run
        from qvl.runtime.serve.options import ServeOptions
    except ImportError as e:
        raise InputError(f"{e.name} is not installed", hint="pip install 'qvl[serve]'") from e
    from qvl.cli.engine import open_model

    out = Output(quiet, verbose)
    settings = ServeOptions(
        host=host,
        port=port,
        api_key=api_key or os.environ.get("QVL_API_KEY") or None,
        parallel=parallel,
        queue=queue,
        media_path=None if media_path is None else expanded(media_path),
        cors=tuple(cors or ()),
    )
    problems: list[BaseException] = []
    with ExitStack() as stack:

        def load() -> tuple[Model, str]:
            loaded = stack.enter_context(open_model(model, out, use_cache=True))
            return loaded, loaded.path.stem

        def announce(address: str) -> None:
            out.line(address)
            out.dim(f"OpenAI's API is at {address}v1; Ctrl-C stops the server")

        try:
            with suppress(SystemExit):  # SIGTERM: by now all that was under way has finished
                run(settings, load, announce=announce, failed=problems.append)
        except OSError as e:
            raise OutputError(f"{host}:{port}: {e.strerror or e}", hint="choose another port (`port`)") from e
    for problem in problems:
        if isinstance(problem, QvlError):
            raise problem
        raise RuntimeError(str(problem)) from problem
