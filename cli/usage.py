"""Usage errors in our own words: the option, the value that was given, and what was expected."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Final

import typer

from qvl.cli.commands import COMMANDS

# What the option parser says of a value, and what that value should be
_EXPECTED: Final = (
    (re.compile(r"valid integer"), "a whole number"),
    (re.compile(r"valid number"), "a number"),
    (re.compile(r"valid boolean"), "yes or no"),
    (re.compile(r"greater than or equal to (\S+)"), r"\1 or more"),
    (re.compile(r"less than or equal to (\S+)"), r"\1 or less"),
    (re.compile(r"finite number"), "a finite number"),
    (re.compile(r"is not one of (.+?)\.?$"), r"one of \1"),
)
_SURPLUS: Final = re.compile(r"Got unexpected extra arguments? \((.*)\)")
_MISSING: Final = re.compile(r"Option '(.+)' requires an argument")


def unknown(word: str) -> tuple[str, str]:
    """The error and the hint for a first word that is neither a command nor an option."""
    close = get_close_matches(word, COMMANDS, n=1)
    meant = f"; did you mean qvl {close[0]}?" if close else ""
    what = "option" if word.startswith("-") else "command"
    return f"{word}: no such {what}{meant}", "qvl --help lists what there is"


def usage_error(error: typer.TyperException, args: Sequence[str]) -> tuple[str, str]:
    """Describe the error in a command line, and hint at the list of its options."""
    command = " ".join(["qvl", *(word for word in args[:1] if word in COMMANDS)])
    return _message(error, args), f"{command} --help lists what there is"


def _message(error: typer.TyperException, args: Sequence[str]) -> str:
    text: str = getattr(error, "message", None) or error.format_message()
    param = getattr(error, "param", None)
    names: list[str] = list(getattr(param, "opts", ()))
    if isinstance(hint := getattr(error, "param_hint", None), str):
        names = [hint]
    for pattern, expected in _EXPECTED:
        if names and (found := pattern.search(text)):
            option, value = _given(args, names)
            choices = found.expand(expected).replace("'", "")
            return f"{option} {value}: expected {choices}".replace(" :", ":")
    if found := _SURPLUS.fullmatch(text):
        return f"unexpected: {found[1]}"
    if found := _MISSING.match(text):
        return f"{found[1]}: a value is missing"
    if name := getattr(error, "option_name", None):
        close = get_close_matches(name, getattr(error, "possibilities", None) or (), n=1)
        meant = f"; did you mean {close[0]}?" if close else ""
        return f"{name}: no such option{meant}"
    if text.startswith("Missing") and param is not None:
        return f"{getattr(param, 'metavar', None) or names[0]} is missing"
    return f"{names[0]}: {text}" if names else text


def _given(args: Sequence[str], names: Sequence[str]) -> tuple[str, str]:
    """The option as it was spelled, and its value; the last one counts."""
    for i in range(len(args) - 1, -1, -1):
        name, is_joined, value = args[i].partition("=")
        if name in names:
            return name, value if is_joined else "".join(args[i + 1 : i + 2])
        if args[i][:2] in names and not args[i].startswith("--"):
            return args[i][:2], args[i][2:]
    return names[-1], ""
