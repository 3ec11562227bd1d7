"""What goes where: stdout for answers, stderr for the rest, and the exit codes."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.terminal import Terminal

from qvl.cli.commands import COMMANDS, overview
from qvl.cli.layout import format_table
from qvl.cli.main import run
from qvl.cli.output import Output, human_bytes, human_rate, human_seconds

QVL = [sys.executable, "-m", "qvl.cli"]


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (1234567, "1.23 MB"),
        (12345678, "12.3 MB"),
        (2.5e9, "2.50 GB"),
    ],
)
def test_sizes(n: float, text: str) -> None:
    assert human_bytes(n) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.9, "9.9 s"), (42.4, "42 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


@pytest.mark.parametrize(
    ("rate", "text"),
    [(2350.4, "2,350 a minute"), (9.97, "10 a minute"), (6, "6 a minute"), (0.52, "0.5 a minute")],
)
def test_rates(rate: float, text: str) -> None:
    assert human_rate(rate) == text


def test_a_table_lines_up() -> None:
    assert format_table([("a", "1"), ("bbb", "22")], ("x", "size")) == "x    size\na       1\nbbb    22"


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["nonsense"], 2, ["nonsense", "qvl --help"]),
        (["chat", "--nonsense"], 2, ["--nonsense", "qvl chat --help"]),
        (["chat", "--image"], 2, ["--image", "qvl chat --help"]),
        (["chat", "--temp", "-1", "-p", "x"], 2, ["--temp"]),
        (["chat", "-p", " "], 2, ["the prompt is empty"]),
        (["inspect", "/no/such/file.gguf"], 1, ["/no/such/file.gguf"]),
        (["convert", "/no/such/folder"], 1, ["/no/such/folder"]),
        (["chat", "-m", "/no/such/folder", "-p", "x"], 1, ["/no/such/folder", "hint:"]),
        (["chat", "--image", "/no/such.png", "-p", "x"], 1, ["/no/such.png: no such file"]),
        (
            ["chat", "--image", "no\nsuch\x1b[31m.png", "-p", "x"],
            1,
            [r"error: no\nsuch\x1b[31m.png: no such"],
        ),
        (["chat", "--draw", "/dev/null/a.png", "-p", "x"], 1, ["/dev/null is not a folder"]),
        (["chat", "--draw", "a.xyz", "-p", "x"], 1, ["a.xyz: the suffix .xyz"]),
        (["chat", "--schema", "/no/such.json", "-p", "x"], 1, ["/no/such.json"]),
    ],
)
def test_errors_say_what_and_what_to_do(
    args: list[str], code: int, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(args) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert "Traceback" not in err
    for word in words:
        assert word in err


def test_a_bare_qvl_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("Usage: qvl")


def test_debug_shows_where(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("QVL_DEBUG", "1")
    assert run(["inspect", "/no/such/file.gguf"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    done = subprocess.run(
        f"{sys.executable} -m qvl.cli models --json | true; exit ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.stderr == ""


WRITES_ALL = """
import os, sys
from qvl.cli import main

def run():
    print("out")
    print("err", file=sys.stderr)
    kept = open(sys.argv[1], "w")
    os.write(2, b"from a library")
    return len(sys.stdin.read())

main.run = run
main.main()
"""


@pytest.mark.parametrize(
    ("closed", "code"), [("<&-", 0), ("</dev/null >&-", 1), ("</dev/null 2>&-", 0), ("<&- >&- 2>&-", 1)]
)
def test_a_closed_stream_is_an_error_where_output_is_lost(closed: str, code: int, tmp_path: Path) -> None:
    """And no file takes its place: what is printed would go there."""
    kept = tmp_path / "kept"
    command = f'"$0" -c "$1" "$2" {closed}'
    done = subprocess.run(["sh", "-c", command, sys.executable, WRITES_ALL, str(kept)], check=False)
    assert done.returncode == code
    assert kept.read_text() == ""


CTRL_C_AT_IMPORT = """
import sys

class Finder:
    def find_spec(self, name, *_):
        if name == "qvl.cli.main":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Finder())
from qvl.cli.__main__ import main
main()
"""


def test_ctrl_c_before_anything_is_loaded() -> None:
    done = subprocess.run([sys.executable, "-c", CTRL_C_AT_IMPORT], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (130, b"")


def test_the_version_is_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("qvl ")


def test_colour_only_on_a_terminal() -> None:
    piped = subprocess.run([*QVL, "nonsense"], capture_output=True, text=True, check=False)
    assert "\x1b" not in piped.stderr
    for env, coloured in (({"NO_COLOR": ""}, True), ({"NO_COLOR": "1"}, False)):
        with Terminal([*QVL, "nonsense"], env) as terminal:
            assert terminal.exit_code() == 2
            assert (b"\x1b[1;31merror:" in terminal._raw) == coloured


LABELLED = """
from qvl.cli.output import Output

words = ["first"]
with Output().progress("working", "pictures", delay=0) as bar:
    bar(0, 1, lambda: f"at the {words[-1]}")
    input()
    words.append("second")
    input()
"""


def test_a_label_that_is_a_function_is_asked_again() -> None:
    with Terminal([sys.executable, "-c", LABELLED]) as terminal:
        terminal.expect("at the first")
        terminal.enter("")
        terminal.expect("at the second")
        terminal.enter("")
        assert terminal.exit_code() == 0


SILENT = """
from qvl.cli.output import Output

with Output().progress("working", "%", delay=0.2):
    input()
with Output().progress("hidden", "%", delay=60):
    pass
"""


def test_a_bar_shows_before_progress_is_reported() -> None:
    with Terminal([sys.executable, "-c", SILENT]) as terminal:
        terminal.expect("working")
        terminal.enter("")
        assert terminal.exit_code() == 0
    assert "hidden" not in terminal.text


PRINTED = """
import time
from qvl.cli.output import Output

out = Output()
with out.progress("working", "pictures", delay=0) as bar:
    bar(0, 2)
    out.line("x" * 500)
    bar(1, 2)
"""


def test_a_bar_leaves_stdout_alone(tmp_path: Path) -> None:
    """It is drawn on stderr; what is printed meanwhile goes where the user sends it, as it is."""
    printed = tmp_path / "printed"
    with Terminal(["sh", "-c", f'"$0" -c "$1" > {printed}', sys.executable, PRINTED]) as terminal:
        terminal.expect("working")
        assert terminal.exit_code() == 0
    assert "x" not in terminal.text
    assert printed.read_text() == "x" * 500 + "\n"


def test_models_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models", "--json"]) == 0
    known = json.loads(capsys.readouterr().out)["known"]
    assert known


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["chat", "--temp", "hot"], "--temp hot: expected a number"),
        (["chat", "-n0"], "-n 0: expected 1 or more"),
        (["chat", "--top-p=3"], "--top-p 3: expected 1 or less"),
        (["chat", "-c", "x"], "-c x: expected a whole number"),
        (["chat", "--image-detail", "huge"], "--image-detail huge: expected one of low, auto, high"),
        (["chat", "--temo", "1"], "--temo: no such option; did you mean --temp?"),
        (["chat", "--temp"], "--temp: a value is missing"),
        (["convert"], "SRC is missing"),
        (["conver"], "conver: no such command; did you mean qvl convert?"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(args) == 2
    assert capsys.readouterr().err.splitlines()[0] == f"error: {message}"


def test_parameters_of_the_library_are_shown_as_flags(capsys: pytest.CaptureFixture[str]) -> None:
    Output().error("too long", "a larger context (`n_ctx`) or smaller pictures (`max_pixels` 784)")
    hint = capsys.readouterr().err.splitlines()[1]
    assert hint == "hint: a larger context (--ctx-size) or smaller pictures (--max-pixels 784)"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_overview_says_of_a_command_what_the_command_does(name: str) -> None:
    module, help = COMMANDS[name]
    function = getattr(importlib.import_module(module), name)
    assert function.__doc__.splitlines()[0] == help
    assert f"  {name} " in overview() and help in overview()


@pytest.mark.parametrize(
    ("line", "found"), [("qvl ch", "chat"), ("qvl chat --ima", "--image"), ("qvl chat --kv-type ", "q8_0")]
)
def test_a_shell_completes_commands_options_and_values(line: str, found: str) -> None:
    words = line.split(" ")
    env = {"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1)}
    env |= {**os.environ, **env, "_QVL_COMPLETE": "complete_bash"}
    done = subprocess.run([*QVL], env=env, capture_output=True, text=True, check=False)
    assert found in done.stdout.split()
