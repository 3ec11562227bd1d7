"""The README speaks of commands and options that exist, and says what the defaults are."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted(
    {line.strip() for line in re.findall(r"(?:^ {4,}|\| |\$ )(qvl [a-z]+ [^#|\n]*)", README, re.M)}
)


@lru_cache
def help_of(command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "qvl.cli", command, "--help"], capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.mark.parametrize("line", COMMANDS)
def test_its_commands_exist(line: str) -> None:
    _, command, *words = shlex.split(line.partition(">")[0])
    known = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", help_of(command)))
    assert {w for w in words if w.startswith("-") and w != "-"} <= known


def test_it_has_commands() -> None:
    assert len(COMMANDS) > 5


@pytest.mark.parametrize("heading", ["Convert", "Chat", "Caption"])
def test_its_tables_list_every_option(heading: str) -> None:
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    if heading == "Caption":
        section += README.split("\n## Chat\n")[1].split("\n## ")[0]
    listed = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", section))
    options = re.findall(r"^  (-.*?)(?:  |$)", help_of(heading.lower()).partition("Options:")[2], re.M)
    rare = {"--help", "--name", "--revision", "--json", "--quiet", "--threads"}
    for option in options:
        names = set(re.findall(r"--?[a-z][a-z-]*", option))
        assert names & (listed | rare), f"{option.strip()} is not in the README"


def test_its_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"\bmake ([a-z]+)", README)) <= targets | {"less"}


def test_its_python_compiles() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec")
