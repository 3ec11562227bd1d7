"""The commands: one row each, with the module that is imported only when the command runs."""

from __future__ import annotations

from typing import Final

# name: (module, one line of help); the function in the module has the command's name
COMMANDS: Final[dict[str, tuple[str, str]]] = {
    "chat": ("qvl.cli.chat.chat", "Talk about pictures and videos."),
    "caption": ("qvl.cli.caption", "Write a caption for each picture and video."),
    "serve": ("qvl.cli.serve", "Serve a model over HTTP."),
    "convert": ("qvl.cli.convert", "Turn a checkpoint into two GGUF files."),
    "inspect": ("qvl.cli.inspect", "Show what a GGUF file holds."),
    "models": ("qvl.cli.models", "List the models on this machine, and those to download."),
    "bench": ("qvl.cli.bench", "Measure how fast a model runs here."),
    "cache": ("qvl.cli.cache", "Show or clear the cache of encoded pictures."),
    "verify": ("qvl.cli.verify", "Measure what a model lost against a reference."),
    "imatrix": ("qvl.cli.imatrix", "Calibrate on pictures, for convert --imatrix."),
}

_OPTIONS: Final = (
    ("--version", "Print the version and exit."),
    ("--install-completion", "Install completion for the current shell."),
    ("--show-completion", "Print that completion script."),
    ("-h, --help", "Show this message and exit."),
)


_PAGE: Final = """Usage: qvl COMMAND [OPTIONS] [ARGS]...

  Qwen's vision models on a laptop: convert them, talk to pictures, caption folders.

Commands:
{commands}

Options:
{options}

qvl COMMAND --help lists the options of a command."""
_WIDE: Final = 86  # columns that the text takes as it is


def overview(columns: int | None = None) -> str:
    """The text of `qvl --help`, made without importing a command or typer: that takes a tenth of a second."""
    if columns is not None and columns < _WIDE:
        return _folded(columns)

    def table(rows: list[tuple[str, str]]) -> str:
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"  {name:<{width}}  {help}" for name, help in rows)

    commands = [(name, help) for name, (_, help) in COMMANDS.items()]
    return _PAGE.format(commands=table(commands), options=table(list(_OPTIONS)))


def _folded(columns: int) -> str:
    from qvl.cli.layout import definitions, wrapped

    commands = definitions([(name, help) for name, (_, help) in COMMANDS.items()], columns)
    return wrapped(_PAGE.format(commands=commands, options=definitions(_OPTIONS, columns)), columns)
