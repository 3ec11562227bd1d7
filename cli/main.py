"""`qvl`: the commands, and what happens to the errors that reach the top.

Command modules import nothing heavy before they run, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated, NoReturn

import typer

from qvl.cli import bench, cache, caption, convert, imatrix, inspect, models, verify
from qvl.cli.chat import chat
from qvl.cli.output import Output
from qvl.runtime.errors import Cancelled, QvlError
from qvl.runtime.interrupt import RAISING

FAILED, USAGE, INTERRUPTED = 1, 2, 130


class Terminated(SystemExit):
    """`kill` has asked to leave. Not a KeyboardInterrupt, which a conversation outlives."""


app = typer.Typer(
    name="qvl",
    help="Qwen2-VL on a laptop: convert it, talk to pictures, caption folders.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # rich alone takes longer to import than the help may take
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("chat")(chat.chat)
app.command("caption")(caption.caption)
app.command("convert")(convert.convert)
app.command("inspect")(inspect.inspect)
app.command("models")(models.models)
app.command("bench")(bench.bench)
app.command("cache")(cache.cache)
app.command("verify")(verify.verify)
app.command("imatrix")(imatrix.imatrix)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import PackageNotFoundError, version

        try:
            own = version("qvl")
        except PackageNotFoundError:  # run from the source tree
            own = "from source"
        Output().line(f"qvl {own}, llama-cpp-python {version('llama-cpp-python')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", metavar="", callback=_version, is_eager=True, help="Print the version and leave."
        ),
    ] = False,
) -> None:
    pass


def run(args: list[str] | None = None) -> int:
    """Run one command line and return its exit code: 0 done, 1 failed, 2 usage, 130 interrupted."""
    out = Output()
    try:
        code = app(args=args, prog_name="qvl", standalone_mode=False)
        sys.stdout.flush()
        if code == INTERRUPTED:  # what typer makes of Ctrl-C
            out.note("interrupted")
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, Terminated, typer.Abort, Cancelled):
        out.note("interrupted")
        return INTERRUPTED
    except typer.TyperException as e:
        return _usage_error(out, e, sys.argv[1:] if args is None else args)
    except QvlError as e:
        out.error(e)
        return FAILED
    except BrokenPipeError:
        # The reader left (`qvl … | head`): that is no error, but nothing more can be written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as e:
        hint = "check the path, its permissions and the free space"
        out.error(f"{e.filename or 'input or output'}: {e.strerror or e}", hint)
        return FAILED
    except Exception as e:
        out.error(f"unexpected {type(e).__name__}: {e}", "QVL_DEBUG=1 shows where")
        return FAILED


def _usage_error(out: Output, error: typer.TyperException, args: list[str]) -> int:
    context = getattr(error, "ctx", None)
    message = error.format_message()
    if context is not None and message == context.get_help():  # a bare `qvl`
        out.note(message)
        return USAGE
    known = {command.name for command in app.registered_commands}
    # taken from the words, for not every error has a context
    command = " ".join(["qvl", *(word for word in args[:1] if word in known)])
    out.error(message, f"{command} --help lists what there is")
    return USAGE


def main() -> None:
    """Run the command line of this process, and leave with its exit code."""
    _open_what_is_closed()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, _terminate)
    RAISING.append(_terminate)
    code = run()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a late one must not cut the leaving short
    sys.exit(code)


def _terminate(number: int, frame: object) -> NoReturn:
    raise Terminated(INTERRUPTED)


def _open_what_is_closed() -> None:
    """Give standard streams that the caller has closed (`qvl … <&-`) the null device.

    Else Python has None for them, and a file opened later gets their number: what a library prints to
    stderr would end up in a file of captions.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
