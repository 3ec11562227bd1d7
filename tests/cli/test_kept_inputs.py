"""No command writes over a file that it reads, `--force` or not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qvl.cli.chat.sessions import Saved, save
from qvl.cli.main import run
from qvl.models import embedded
from qvl.runtime import caption, load
from qvl.runtime.errors import OutputError

FOLDER = embedded.path().parent
SAMPLES = FOLDER / "samples"
Files = dict[str, Path]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """An input of every kind, each a copy."""
    found = {name: tmp_path / name for name in ("a.png", "text.gguf", "mmproj.gguf")}
    shutil.copy(SAMPLES / "one.png", found["a.png"])
    for name, source in zip(
        ("mmproj.gguf", "text.gguf"), sorted((FOLDER / "gguf").glob("*.gguf")), strict=True
    ):
        shutil.copy(source, found[name])
    texts = {"a.txt": str(found["a.png"]), "a.csv": "name,what\na.png,star\n", "a.json": '{"type": "object"}',
             "a.md": "What is {what}?", "words.txt": "Hello there. " * 20}  # fmt: skip
    for name, text in texts.items():
        found[name] = tmp_path / name
        found[name].write_text(text)
    return found


def given(files: Files) -> list[str]:
    named = (("--vars", "a.csv"), ("--prompt-file", "a.md"), ("--schema", "a.json"))
    return [part for option, name in named for part in (option, str(files[name]))]


def kept(files: Files, command: Callable[[], int], said: Callable[[], str]) -> None:
    before = {path: path.read_bytes() for path in files.values()}
    assert command() == 1
    assert "is an input" in said()
    assert {path: path.read_bytes() for path in files.values()} == before


@pytest.mark.parametrize("name", ["a.png", "text.gguf", "mmproj.gguf", "a.txt", "a.csv", "a.json", "a.md"])
@pytest.mark.parametrize("link", [None, os.symlink, os.link])
def test_captions(
    files: Files, name: str, link: Callable[[Path, Path], None] | None, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    target = files[name]
    if link is not None:
        target = tmp_path / "other.jsonl"
        link(files[name], target)
    command = ["caption", f"@{files['a.txt']}", "-o", str(target), "--overwrite", "-t", "1", "-n", "1"]
    command += ["-m", str(files["text.gguf"]), "--mmproj", str(files["mmproj.gguf"])]
    command += prompt_files(files)
    kept(files, lambda: run(command), lambda: capsys.readouterr().err)


def prompt_files(files: Files) -> list[str]:
    """Options that name every text file which a run of captions reads."""
    named = {"--vars": "a.csv", "--prompt-file": "a.md", "--schema": "a.json"}
    return [part for option, name in named.items() for part in (option, str(files[name]))]


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".json", ".md"])
def test_text_files_beside_pictures(files: Files, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["caption", f"@{files['a.txt']}", "--sidecar", suffix, "--overwrite", "-t", "1", "-n", "1"]
    command += prompt_files(files)
    kept(files, lambda: run(command), lambda: capsys.readouterr().err)


def test_captions_from_python(files: Files) -> None:
    with load(files["text.gguf"], files["mmproj.gguf"], device="cpu", threads=1) as model:
        for name in ("a.png", "text.gguf", "mmproj.gguf", "a.csv", "a.json"):
            with pytest.raises(OutputError, match="is an input"):
                caption(model, files["a.png"], output=files[name], mode="overwrite", schema=files["a.json"],
                        variables=files["a.csv"])  # fmt: skip


@pytest.mark.parametrize("name", ["a.png", "text.gguf", "mmproj.gguf", "words.txt", "asked.txt"])
def test_imatrix(files: Files, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["imatrix", "-m", str(files["text.gguf"]), "--mmproj", str(files["mmproj.gguf"]), "--force"]
    folder = files["a.png"].parent
    (folder / "asked.txt").write_text("What is it?\n")
    command += ["--text", str(files["words.txt"]), "--images", str(folder), "-o", str(folder / name)]
    command += ["--prompts", str(folder / "asked.txt")]
    kept(files, lambda: run(command), lambda: capsys.readouterr().err)


@pytest.mark.parametrize("which", ["text", "mmproj"])
def test_convert(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], which: str
) -> None:
    target = tmp_path / ("m-Q8_0.gguf" if which == "text" else "mmproj-m-Q8_0.gguf")
    target.write_bytes(b"an importance matrix")
    command = ["convert", str(tiny_checkpoint), "-o", str(tmp_path), "--type", "q8_0", "--name", "m"]
    command += ["--imatrix", str(target), "--force"]
    kept({"imatrix": target}, lambda: run(command), lambda: capsys.readouterr().err)


def test_drawing(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["chat", "--image", str(files["a.png"]), "-p", "Find the red star.", "--force", "-t", "1"]
    for target in ("a.png", "./a.png"):
        full = [*command, "--draw", str(files["a.png"].parent / target)]
        kept(files, lambda full=full: run(full), lambda: capsys.readouterr().err)


def test_saving(files: Files) -> None:
    for path in files.values():
        before = path.read_bytes()
        with pytest.raises(OutputError, match="exists, and is not a session"):
            save(str(path), Saved([]))
        assert path.read_bytes() == before


def test_folders_of_outputs_are_made(files: Files, tmp_path: Path) -> None:
    """For every option that names one."""
    picture, words, new = str(files["a.png"]), str(files["words.txt"]), tmp_path / "new"
    find = ["chat", "-q", "-t", "1", "--image", picture, "-p", "Find the red star."]
    commands = {
        "1/c.jsonl": ["caption", "-q", "-t", "1", "-n", "1", picture, "-o"],
        "2/i.gguf": ["imatrix", "-q", "-t", "1", "--squares-only", "--text", words, "-o"],
        "3/d.png": [*find, "--draw"],
        "4/a.txt": ["caption", "-q", "-t", "1", "-n", "1", picture, "--out-dir"],
    }
    for name, command in commands.items():
        target = new / name if command[-1] != "--out-dir" else (new / name).parent
        assert run([*command, str(target)]) == 0
        assert (new / name).is_file()
    assert save(str(new / "5" / "s.json"), Saved([])).is_file()


def test_a_folder_that_cannot_be_made_is_said(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = str(files["words.txt"])
    assert run(["imatrix", "-q", "--text", words, "-o", str(files["a.txt"] / "i.gguf")]) == 1
    assert f"{files['a.txt']}/i.gguf: cannot be written" in capsys.readouterr().err
