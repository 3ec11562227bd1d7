"""The help of a command: usage, what it does, its arguments and options, as wide as the terminal."""

from __future__ import annotations

import shutil
from typing import Any, Final

from typer.core import TyperCommand

from qvl.cli.layout import definitions, wrapped

_WIDEST: Final = 100


class Command(TyperCommand):
    """A command whose help is laid out by `qvl.cli.layout`."""

    def get_help(self, ctx: Any) -> str:
        """The text of `qvl COMMAND --help`."""
        width = min(shutil.get_terminal_size().columns, _WIDEST)
        params: list[Any] = self.get_params(ctx)
        arguments = [(_metavar(p), p.help or "") for p in params if p.param_type_name == "argument"]
        options = [(_spelling(p), _meaning(p)) for p in params if p.param_type_name == "option"]
        usage = " ".join([ctx.command_path, "[OPTIONS]", *(name for name, _ in arguments)])
        first, _, rest = (self.help or "").partition("\n\n")
        about = [first, *(" ".join(part.split()) for part in rest.split("\n\n") if part)]
        blocks = [
            wrapped(f"Usage: {usage}", width),
            *(wrapped(f"  {text}", width) for text in about),
            f"Arguments:\n{definitions(arguments, width)}" if arguments else "",
            f"Options:\n{definitions(options, width)}",
        ]
        return "\n\n".join(filter(None, blocks))


def _metavar(param: Any) -> str:
    return str(param.metavar or param.name.upper())


def _spelling(param: Any) -> str:
    """The spellings of an option and its value: "-m, --model FILE"."""
    names = sorted(param.opts, key=lambda name: name.startswith("--"))
    joined = " / ".join([", ".join(names), *param.secondary_opts])
    return f"{joined} {param.metavar or ''}".rstrip()


def _meaning(param: Any) -> str:
    """The help of an option with its default, unless the help says it."""
    help: str = param.help or ""
    default = param.default
    if default is None or isinstance(default, bool | list) or default in ("", ()) or "Default" in help:
        return help
    return f"{help} Default: {default}."
