"""Run what README.md shows, and put what comes out in place of what stands there: `make readme`.

A transcript is an indented block between `<!-- transcript -->` and `<!-- /transcript -->`. Its lines
that begin with `$ ` are run in the repository's root; lines that begin with `>>> ` are typed into the last
of them, in a pseudo-terminal.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
BLOCK = re.compile(r"(<!-- transcript -->\n\n)(.*?)(\n<!-- /transcript -->)", re.S)
PROMPT = re.compile(r"^(?:\[[^\]]*\] )?>>> ")
WIDTH = 150

sys.path.insert(0, str(ROOT / "tests"))


def refresh(block: str) -> str:
    """The block with every command run again."""
    lines = [line.removeprefix("    ") for line in block.splitlines()]
    inputs = [PROMPT.sub("", line) for line in lines if PROMPT.match(line)]
    shown: list[str] = []
    for command in [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]:
        said = converse(command, inputs) if inputs else run(command)
        shown += [f"$ {command}", *said.splitlines()]
    return "".join(f"    {line}".rstrip() + "\n" for line in map(cut, shown))


def run(command: str) -> str:
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.stdout.strip("\n")


def converse(command: str, inputs: list[str]) -> str:
    from support.terminal import Terminal

    with Terminal(shlex.split(command), cwd=str(ROOT)) as terminal:
        terminal.expect(r">>> $")
        for line in inputs:
            terminal.enter(line)
            terminal.expect(r"\n[^\n]*>>> $")
        terminal.leave()
        # A bar that was drawn and taken away again is no part of what stays on the screen.
        said = "\n".join(line for line in terminal.text.splitlines() if "━" not in line)
        return re.sub(r"\n>>>\s*$", "", said)


def cut(line: str) -> str:
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…"


def main() -> None:
    for drawn in (ROOT / "demo").glob("*.png"):  # `/draw` would ask before it overwrites one
        drawn.unlink()
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    os.environ |= {"NO_COLOR": "1", "TERM": "dumb"}
    text = README.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as home:
        os.environ |= {"HOME": home, "XDG_STATE_HOME": "", "XDG_CACHE_HOME": ""}
        text = BLOCK.sub(lambda match: f"{match[1]}{refresh(match[2])}{match[3]}", text)
    README.write_text(text, encoding="utf-8")
    shutil.copyfile(ROOT / "demo" / "boxes.png", ROOT / "docs" / "boxes.png")


if __name__ == "__main__":
    main()
