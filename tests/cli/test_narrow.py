"""Every command in a terminal of 40 columns: no line is longer but those that must be copied whole."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from support.checkpoint import Style, write_checkpoint
from support.terminal import Terminal

import qvl.models
from qvl.cli.commands import COMMANDS
from qvl.cli.layout import definitions, format_table, wrapped
from qvl.cli.main import run

QVL = [sys.executable, "-m", "qvl.cli"]
WIDTH = 40
SAMPLES = Path(qvl.models.__path__[0]) / "samples"


def too_long(text: str) -> list[str]:
    """Lines that do not fit, but for commands to copy, and for a single word that is longer."""
    long = [line for line in text.splitlines() if len(line) > WIDTH and len(line.split()) > 1]
    return [line for line in long if not line.startswith("  qvl ")]


def drawn(terminal: Terminal) -> str:
    """Everything that was on the screen, a bar that was drawn over itself as several lines."""
    text = terminal._raw.decode().replace("\r\n", "\n").replace("\r", "\n")
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


@pytest.fixture
def narrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    for name in ("one.png", "two.jpg"):
        shutil.copy(SAMPLES / name, tmp_path)
    return tmp_path


def output_of(cwd: Path, *args: str) -> str:
    with Terminal([*QVL, *args], {"COLUMNS": str(WIDTH)}, cwd=str(cwd)) as terminal:
        assert terminal.exit_code() == 0, terminal.text
        return drawn(terminal)


@pytest.mark.parametrize("args", [[], *([name] for name in COMMANDS)])
def test_the_help_fits(args: list[str], narrow: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*args, "--help"]) == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) > 6
    assert too_long(text) == []


def test_what_commands_print_fits(narrow: Path) -> None:
    write_checkpoint(narrow / "small", style=Style(chat_template="chatml"))
    told = {
        "convert": output_of(narrow, "convert", "small", "-o", "m", "--type", "q8_0"),
        "models": output_of(narrow, "models"),
        "inspect": output_of(narrow, "inspect", "m"),
        "memory": output_of(narrow, "inspect", "m", "--memory"),
        "cache": output_of(narrow, "cache"),
        "bench": output_of(narrow, "bench", "-m", "m", "--sizes", "56", "--write", "4", "-r", "1"),
        "verify": output_of(narrow, "verify", "m", "--against", "m", "--limit", "1", "-n", "2"),
        "caption": output_of(narrow, "caption", "one.png", "two.jpg", "-n", "12"),
        "imatrix": output_of(narrow, "imatrix", "-m", "m", "--images", ".", "-o", "i.gguf", "-n", "1"),
    }
    for name, text in told.items():
        assert text.strip(), name
        assert too_long(text) == [], f"{name}\n{text}"
    assert "KL mean" in told["verify"] and "MB" in told["models"]


def test_a_conversation_fits(narrow: Path) -> None:
    with Terminal([*QVL, "chat"], {"COLUMNS": str(WIDTH)}, cwd=str(narrow)) as terminal:
        terminal.expect(r">>> $")
        for line in ("/help", "/set", "two.jpg Find the red star.", "/stats", "/nonsense", "/undo"):
            terminal.enter(line)
            terminal.expect(r"\n[^\n]*>>> $")
        assert terminal.leave() == 0
        assert too_long(drawn(terminal)) == [], terminal.text


def test_a_table_is_folded() -> None:
    rows = [("decoder", "1.25e-03", "97%"), ("together", "2.50e-03", "")]
    wide = format_table(rows, ("part", "KL mean", "top-1"), width=60)
    assert wide == format_table(rows, ("part", "KL mean", "top-1"))
    narrow = format_table(rows, ("part", "KL mean", "top-1"), width=24)
    assert narrow == "decoder\n    KL mean 1.25e-03,\n    top-1 97%\ntogether\n    KL mean 2.50e-03"


def test_lines_are_broken_at_blanks() -> None:
    assert wrapped("  one two three", 9) == "  one two\n  three"
    assert wrapped("  qvl convert A -o B", 9) == "  qvl convert A -o B"  # to be copied
    assert wrapped("a\n\nb", 9) == "a\n\nb"
    assert wrapped("any width", None) == "any width"
    assert definitions([("-a", "one two")], 100) == "  -a  one two"
    assert not re.search(r".{31}", definitions([("--long-option NAME", "what it does, in words")], 30))


def test_the_terminal_itself_says_its_width(narrow: Path) -> None:
    """Without COLUMNS, by the terminal's own size."""
    import fcntl
    import struct
    import termios

    with Terminal([*QVL, "cache"], {"COLUMNS": ""}, cwd=str(narrow)) as terminal:
        fcntl.ioctl(terminal._fd, termios.TIOCSWINSZ, struct.pack("HHHH", 30, WIDTH, 0, 0))
        assert terminal.exit_code() == 0
        assert too_long(terminal.text) == [] and terminal.text.count("\n") > 1
    assert os.environ["COLUMNS"] == str(WIDTH)
