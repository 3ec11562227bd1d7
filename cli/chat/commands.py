"""The slash commands of a conversation: one table, one function each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qvl.cli.chat import sessions
from qvl.cli.chat.attachments import attach, clean_path, shown, split_paths
from qvl.cli.layout import definitions, format_table
from qvl.cli.options import SamplingOptions
from qvl.runtime.errors import InputError
from qvl.runtime.vision.kind import Kind

if TYPE_CHECKING:
    from qvl.cli.chat.repl import Repl


class Leave(Exception):
    """The user ends the conversation."""


@dataclass(frozen=True)
class Command:
    """A slash command.

    Attributes:
        argument: its name in /help.
        run: carries it out.
        choices: what Tab completes the argument to; None for paths.
    """

    argument: str
    help: str
    run: Callable[[Repl, str], None]
    choices: Callable[[Repl], list[str]] | None = None


def run(repl: Repl, line: str) -> None:
    """Run a line that begins with a slash.

    Raises:
        InputError: no such command, or what the command refuses.
    """
    name, _, argument = line[1:].partition(" ")
    name = name.lower()
    command = COMMANDS.get(name) or COMMANDS.get(ALIASES.get(name, ""))
    if command is None:
        close = get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean /{close[0]}?" if close else "/help lists the commands"
        raise InputError(f"/{name}: no such command", hint=hint)
    command.run(repl, argument.strip())


def _attach(kind: Kind) -> Callable[[Repl, str], None]:
    return lambda repl, argument: repl.attach(attach(split_paths(argument), kind))


def _draw(repl: Repl, argument: str) -> None:
    repl.draw(Path(_one_path(argument)) if argument else None)


def _detach(repl: Repl, argument: str) -> None:
    taken = repl.conversation.detach(_one_path(argument) if argument else None)
    repl.out.dim(f"detached: {', '.join(a.path.name for a in taken)}")


def _attached_names(repl: Repl) -> list[str]:
    return [a.path.name for a in repl.conversation.pending]


def _one_path(argument: str) -> str:
    """The argument as one name: blanks in it need no quotes."""
    paths = split_paths(argument)
    return paths[0] if len(paths) == 1 else clean_path(argument)


def _clear(repl: Repl, argument: str) -> None:
    repl.conversation.clear()
    repl.out.dim("conversation cleared; system prompt and settings kept")


def _undo(repl: Repl, argument: str) -> None:
    text, attached = repl.conversation.undo()
    names = "".join(f" [{a.path.name}]" for a in attached)
    repl.out.dim(f"removed:{names} {text}")


def _retry(repl: Repl, argument: str) -> None:
    repl.ask(repl.conversation.take_back())


def _edit(repl: Repl, argument: str) -> None:
    repl.reader.offer(repl.conversation.take_back())
    repl.out.dim("change the question and press Enter")


def _system(repl: Repl, argument: str) -> None:
    if argument:
        repl.conversation.set_system(None if argument == "none" else argument.strip("\"'"))
    prompt = repl.conversation.system or "the model's default"
    repl.out.answer(f"system prompt: {prompt}")


def _set(repl: Repl, argument: str) -> None:
    names = [field.name for field in fields(SamplingOptions)]
    if argument:
        argument = argument.removeprefix("parameter ")  # as `ollama run` has it
        name, _, value = argument.replace("=", " ").partition(" ")
        if not value.strip():
            raise InputError("a setting needs a value", hint="/set temperature 0.7")
        names = [repl.conversation.set(name, value.strip())]
    values = asdict(repl.conversation.sampling)
    rows = [(name, "default" if values[name] is None else str(values[name])) for name in names]
    repl.out.answer(format_table(rows))


def _save(repl: Repl, argument: str) -> None:
    name = _one_path(argument) if argument else sessions.LAST
    repl.out.answer(f"saved to {shown(sessions.save(name, repl.conversation.saved()))}")


def _load(repl: Repl, argument: str) -> None:
    repl.restore(sessions.load(_one_path(argument) if argument else sessions.LAST))


def _stats(repl: Repl, argument: str) -> None:
    repl.show_stats()


def _help(repl: Repl, argument: str) -> None:
    rows = [(f"/{name} {command.argument}".rstrip(), command.help) for name, command in COMMANDS.items()]
    lines = [
        definitions(rows, repl.out.note_width),
        "",
        '  """ begins and ends a message of several lines; several pasted lines are one message.',
        "  A path in a message attaches that picture or video. Tab completes commands, names and paths.",
        "  Ctrl-C stops a reply; Ctrl-D exits.",
    ]
    repl.out.answer("\n".join(lines))


def _exit(repl: Repl, argument: str) -> None:
    raise Leave


COMMANDS: Final[dict[str, Command]] = {
    "image": Command("PATH…", "attach pictures to the next message", _attach("image")),
    "video": Command("PATH…", "attach a video, or a folder of frames", _attach("video")),
    "detach": Command(
        "[NAME]", "detach all that is attached, or one picture", _detach,
        _attached_names,
    ),
    "draw": Command("[PATH]", "draw the boxes of the last reply onto its picture", _draw),
    "clear": Command("", "clear the conversation", _clear, lambda _: []),
    "undo": Command("", "remove the last question and its reply", _undo, lambda _: []),
    "retry": Command("", "ask the last question again", _retry, lambda _: []),
    "edit": Command("", "change the last question", _edit, lambda _: []),
    "system": Command("[TEXT]", "set the system prompt (none: the model's default), or show it", _system),
    "set": Command(
        "[NAME VALUE]", "change a setting (temperature, seed, …), or show them all", _set,
        lambda _: [field.name for field in fields(SamplingOptions)],
    ),
    "save": Command("[NAME|PATH]", "save the conversation", _save, lambda _: sessions.session_names()),
    "load": Command("[NAME|PATH]", "load a saved conversation", _load, lambda _: sessions.session_names()),
    "stats": Command("", "tokens and times of the last reply, and the context in use", _stats, lambda _: []),
    "help": Command("", "show this", _help, lambda _: []),
    "exit": Command("", "exit", _exit, lambda _: []),
}  # fmt: skip
ALIASES: Final = {"quit": "exit", "bye": "exit", "?": "help", "img": "image"}
