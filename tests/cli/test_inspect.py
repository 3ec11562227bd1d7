"""`qvl inspect` and `qvl convert`, held against gguf-py and llama.cpp's own account of its memory."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from gguf import GGUFReader
from support.terminal import Terminal

from qvl.cli.inspect import report
from qvl.cli.main import run
from qvl.convert import Converted
from qvl.runtime.ggml.gguf import read_gguf

QVL = [sys.executable, "-m", "qvl.cli"]
# Load in a process of its own, and print what llama.cpp says of its KV cache.
KV_SIZE = """
import sys, llama_cpp
lines = []
log = llama_cpp.llama_log_callback(lambda level, text, data: lines.append(text.decode("utf-8", "replace")))
llama_cpp.llama_log_set(log, None)
llama_cpp.Llama(sys.argv[1], n_ctx=int(sys.argv[2]), verbose=True)
print("".join(lines))
"""


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    assert run(["convert", str(tiny_checkpoint), "-o", str(folder), "-q"]) == 0
    return folder


@pytest.mark.parametrize("pattern", ["tiny-*.gguf", "mmproj-*.gguf"])
def test_tensors_by_type_are_those_of_gguf_py(quantized: Path, pattern: str) -> None:
    (path,) = quantized.glob(pattern)
    reference = GGUFReader(path)
    count = Counter(t.tensor_type.name for t in reference.tensors)
    size: Counter[str] = Counter()
    for tensor in reference.tensors:
        size[tensor.tensor_type.name] += int(tensor.n_bytes)
    said = report(read_gguf(path), (2048,))
    assert {row["type"]: (row["tensors"], row["bytes"]) for row in said["tensors"]} == {
        kind: (count[kind], size[kind]) for kind in count
    }
    assert said["bytes"] == path.stat().st_size


def test_what_cannot_be_read_is_said_once(
    quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By us: ggml would print as well. The name need be no UTF-8."""
    cut = tmp_path / b"cut\xe9.gguf".decode("utf-8", "surrogateescape")
    cut.write_bytes(next(quantized.glob("mmproj-*.gguf")).read_bytes()[:200])
    done = subprocess.run([*QVL, "inspect", cut], capture_output=True, check=False)
    assert done.returncode == 1
    first, hint = done.stderr.decode().splitlines()
    assert first.startswith("error: ") and "the GGUF header cannot be read" in first
    assert hint.startswith("hint: ")
    (tmp_path / "empty.gguf").touch()
    assert run(["inspect", str(tmp_path / "empty.gguf")]) == 1
    assert "not a GGUF file: it is empty" in capsys.readouterr().err


def test_what_a_file_says_does_not_steer_the_terminal(
    quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = next(quantized.glob("mmproj-*.gguf")).read_bytes()
    at = content.index(b"general.name") + len(b"general.name") + 12  # its type and its length
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(content[:at] + b"\x1b[m" + content[at + 3 :])
    assert run(["inspect", str(bad)]) == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize("n_ctx", [512, 1000])
def test_the_context_takes_what_llama_cpp_says(tiny_model: Converted, n_ctx: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KV_SIZE, str(tiny_model.text), str(n_ctx)],
        capture_output=True,
        text=True,
        check=True,
    )
    match = re.search(r"KV buffer size =\s+([\d.]+) MiB", done.stdout + done.stderr)
    assert match
    said = report(read_gguf(tiny_model.text), (n_ctx,))["memory"]["kv_cache"][str(n_ctx)]
    assert said / 2**20 == pytest.approx(float(match[1]), abs=0.006)


def test_a_folder_shows_both_files(quantized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(quantized), "-c", "4096"]) == 0
    text = capsys.readouterr().out
    for words in (
        "qwen2vl",
        "clip",
        "Q4_K",
        "Q8_0",
        "context of 4096 tokens",
        "a picture takes 4 to 16384 tokens",
    ):
        assert words in text
    assert run(["inspect", str(quantized), "--json"]) == 0
    assert [r["architecture"] for r in json.loads(capsys.readouterr().out)] == ["clip", "qwen2vl"]


def test_a_checkpoint_gets_a_hint(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(tiny_checkpoint)]) == 1
    assert "qvl convert" in capsys.readouterr().err


def test_a_file_cut_short_is_refused(
    tiny_model: Converted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny_model.text.read_bytes()[:-1000])
    assert run(["inspect", str(path)]) == 1
    assert "cut.gguf" in capsys.readouterr().err


def test_convert_says_what_it_wrote(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["convert", str(tiny_checkpoint), "-o", str(tmp_path), "--type", "q8_0", "--vision-type", "f16"]
    assert run(args) == 0
    out, err = capsys.readouterr()
    assert out == ""
    for words in ("tiny-Q8_0.gguf", "mmproj-tiny-F16.gguf", "bits per weight", "done in"):
        assert words in err
    assert run(args) == 1
    assert "--force" in capsys.readouterr().err
    assert run([*args, "--force", "--json"]) == 0
    assert Path(json.loads(capsys.readouterr().out)["text"]).name == "tiny-Q8_0.gguf"


def test_an_unknown_type_names_the_known(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["convert", str(tiny_checkpoint), "-o", str(tmp_path), "--type", "q9"]) == 1
    assert "q4_k_m" in capsys.readouterr().err


AT_ONCE = """
from qvl.cli import __main__, output
begin = output.Bar.__init__
output.Bar.__init__ = lambda self, label, unit, delay: begin(self, label, unit, 0 if delay < 1 else delay)
__main__.main()
"""


def test_convert_shows_a_bar_on_a_terminal_only(tiny_checkpoint: Path, tmp_path: Path) -> None:
    args = [sys.executable, "-c", AT_ONCE, "convert", str(tiny_checkpoint), "-o", str(tmp_path), "--force"]
    with Terminal(args) as terminal:
        assert terminal.exit_code() == 0
        assert re.search(r"MB|kB|bytes", terminal.text)
        assert "\x1b[?25l" in terminal._raw.decode()  # the cursor is hidden while a bar is drawn
    piped = subprocess.run(args, capture_output=True, text=True, check=True)
    assert "\x1b" not in piped.stderr
    assert piped.stdout == ""
