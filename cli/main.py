"""`qvl`: runs one command, and reports the errors that reach the top.

Nothing heavy is imported before it is needed, so that `--help` answers at once.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from qvl.cli.commands import COMMANDS, overview

if TYPE_CHECKING:
    import typer

FAILED, USAGE, INTERRUPTED = 1, 2, 130
_COMPLETION = ("--install-completion", "--show-completion")


class Terminated(SystemExit):
    """`kill` asks the program to exit. Not a KeyboardInterrupt, which a conversation outlives."""


def run(args: list[str] | None = None) -> int:
    """Run one command line and return its exit code: 0 done, 1 failed, 2 usage, 130 interrupted."""
    args = sys.argv[1:] if args is None else args
    if args and args[0] in ("-h", "--help"):
        sys.stdout.write(f"{overview(_columns(sys.stdout))}\n")
        return 0
    if not args and not _is_completing():
        sys.stderr.write(f"{overview(_columns(sys.stderr))}\n")
        return USAGE
    return _run(args)


def _columns(stream: TextIO) -> int | None:
    """The width of a terminal, without the time that importing `qvl.cli.layout` takes; None without one."""
    given = os.environ.get("COLUMNS", "")
    try:
        return int(given) if given.isdecimal() else os.get_terminal_size(stream.fileno()).columns or None
    except (OSError, ValueError):
        return None


def _run(args: list[str]) -> int:
    import typer

    from qvl.cli.output import Output
    from qvl.runtime.errors import Cancelled, QvlError

    out = Output()
    try:
        if args[:1] == ["--version"]:
            out.line(_version())
            return 0
        if not (_is_completing() or args[0] in COMMANDS or args[0].partition("=")[0] in _COMPLETION):
            from qvl.cli.usage import unknown

            out.error(*unknown(args[0]))
            return USAGE
        code = _app(args)(args=args, prog_name="qvl", standalone_mode=False)
        sys.stdout.flush()
        if code == INTERRUPTED:  # what typer makes of Ctrl-C
            out.note("interrupted")
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, Terminated, typer.Abort, Cancelled):
        out.note("interrupted")
        return INTERRUPTED
    except typer.TyperException as e:
        from qvl.cli.usage import usage_error

        message, hint = usage_error(e, args)
        out.error(message, hint)
        return USAGE
    except QvlError as e:
        out.error(e)
        return FAILED
    except BrokenPipeError:
        # The reader left (`qvl … | head`): that is no error, but nothing more can be written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as e:
        if e.errno == errno.EBADF and not e.filename:
            out.error(
                "stdout is closed: the output cannot be written", "leave out `>&-`, or name a file with -o"
            )
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return FAILED
        hint = "check the path, its permissions and the free space"
        out.error(f"{e.filename or 'input or output'}: {e.strerror or e}", hint)
        return FAILED
    except Exception as e:
        out.error(f"unexpected {type(e).__name__}: {e}", "QVL_DEBUG=1 shows where")
        return FAILED


def _app(args: list[str]) -> typer.Typer:
    """The program with the one command that is asked for; with all of them to complete a command line."""
    from importlib import import_module

    import typer

    from qvl.cli.help import Command

    wanted = [args[0]] if args[:1] and args[0] in COMMANDS else list(COMMANDS)
    app = typer.Typer(
        name="qvl",
        add_completion=len(wanted) > 1,
        rich_markup_mode=None,  # rich alone takes longer to import than the help may take
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for name in wanted:
        function: Any = getattr(import_module(COMMANDS[name][0]), name)
        app.command(name, cls=Command)(function)
    app.callback()(_root)  # keeps the command's name in the command line where there is only one
    return app


def _root() -> None:
    pass


def _is_completing() -> bool:
    """Return whether a shell asks for completions."""
    return "_QVL_COMPLETE" in os.environ


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        own = version("qvl")
    except PackageNotFoundError:  # run from the source tree
        own = "from source"
    return f"qvl {own}, llama-cpp-python {version('llama-cpp-python')}"


def main() -> None:
    """Run the command line of this process, and exit with its code."""
    _open_what_is_closed()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # Windows writes its old code page to pipes and files, in which JSON would be no JSON.
            stream.reconfigure(encoding="utf-8" if os.name == "nt" else None, errors="backslashreplace")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # as names and lists are read
    signal.signal(signal.SIGTERM, _terminate)
    if sys.argv[1:2] not in ([], ["-h"], ["--help"]):
        from qvl.runtime.interrupt import RAISING

        RAISING.append(_terminate)
    code = run()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a late one must not cut the exit short
    if code == INTERRUPTED:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # nor a second one of these
    try:
        sys.stdout.flush()
    except OSError:  # closed by the caller: what was printed is lost
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = code or FAILED
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
            # What is asked for would be lost in the null device without a word, so writing there fails.
            null = os.open(os.devnull, os.O_RDONLY if name == "stdout" else os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
