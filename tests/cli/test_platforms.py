"""The command line on systems that lack what Unix or Linux alone has (see support.bare_platform)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
from support import bare_platform
from support.caption_fakes import write_pictures

from qvl.models import embedded
from qvl.runtime import resources
from qvl.runtime.caption.inputs import Item
from qvl.runtime.caption.sidecar import Sidecars
from qvl.runtime.errors import InputError
from qvl.runtime.files import default_directory, ignores_case, is_portable, state_dir

SAMPLES = embedded.path().parent / "samples"


def qvl(*arguments: str | Path, home: Path, typed: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line without Unix's own."""
    terminal: list[int] = []
    if typed:  # by a person at a terminal, without readline
        terminal = [*pytest.importorskip("pty").openpty()]
        os.write(terminal[0], typed.encode())
    try:
        done = subprocess.run(
            [sys.executable, bare_platform.__file__, *map(str, arguments)],
            capture_output=True, text=True, check=False, timeout=120,
            stdin=terminal[1] if terminal else subprocess.DEVNULL,
            env={"PATH": "/usr/bin:/bin", "HOME": str(home), "QVL_DEBUG": "1"},
        )  # fmt: skip
    finally:
        for number in terminal:
            os.close(number)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
    return done


def test_chat_answers_twice_and_keeps_a_session(tmp_path: Path) -> None:
    """One shot, then a conversation from a pipe; the cache and the session are written twice each."""
    for _ in range(2):
        done = qvl("chat", "--image", SAMPLES / "one.png", "-p", "What is it?", "--temp", "0", home=tmp_path)
        assert "star" in done.stdout
        typed = "Hello?\n/save mine\n/quit\n"
        qvl("chat", "--temp", "0", home=tmp_path, typed=typed)
    (saved,) = tmp_path.rglob("mine.json")
    assert json.loads(saved.read_text())["messages"]
    assert list(tmp_path.rglob("*.safetensors"))
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv"])
def test_captions_are_redone_in_place(tmp_path: Path, name: str) -> None:
    write_pictures(tmp_path / "in", 3)
    out = tmp_path / name
    arguments = ["caption", tmp_path / "in", "-o", out, "--sidecar", "--max-tokens", "4"]
    qvl(*arguments, home=tmp_path)
    first = out.read_bytes()
    qvl(*arguments, "--overwrite", home=tmp_path)
    assert out.read_bytes().count(b"\n") == first.count(b"\n")
    qvl(*arguments, "--append", home=tmp_path)
    texts = [path.read_text() for path in sorted((tmp_path / "in").glob("*.txt"))]
    assert len(texts) == 3 and all(texts)
    assert not [path for path in tmp_path.rglob(".*") if path.suffix in (".part", ".lock", ".pid")]


def test_conversion_inspection_and_calibration(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    qvl("convert", tiny_checkpoint, "-o", out, "--type", "q8_0", home=tmp_path)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    qvl("convert", tiny_checkpoint, "-o", out, "--type", "q8_0", "--force", home=tmp_path)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert len(before) == 2
    assert "tiny-Q8_0.gguf" in qvl("inspect", out / "tiny-Q8_0.gguf", home=tmp_path).stdout
    shutil.copy(SAMPLES / "one.png", tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("Hello there. " * 40)
    for more in ((), ("--force",)):
        qvl("imatrix", "-m", out, "--text", text, "-o", tmp_path / "i.gguf", *more, home=tmp_path)
    assert (tmp_path / "i.gguf").stat().st_size > 1000


# parts ---------------------------------------------------------------------------------------------------


def test_free_memory_on_windows_and_where_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def status(pointer: object) -> int:
        memory = pointer._obj  # type: ignore[attr-defined]
        assert memory.dwLength == 64
        memory.ullAvailPhys = 123 << 20
        return 1

    monkeypatch.setattr(resources, "Path", lambda name: Path("/missing"))
    windll = types.SimpleNamespace(kernel32=types.SimpleNamespace(GlobalMemoryStatusEx=status))
    with monkeypatch.context() as patch:
        patch.setattr("sys.platform", "win32")
        patch.setattr(resources.ctypes, "windll", windll, raising=False)
        assert resources.free_memory() == 123 << 20
    monkeypatch.delattr("os.sysconf")
    assert resources.free_memory() == 2 << 30
    assert resources.resident_bytes() == 100_000_000


@pytest.mark.parametrize(
    "name",
    ["NUL", "nul.gguf", "con.tar.gz", "COM1", "lpt9.txt", "aux .x", "a:b", "a?", "a*", "a.", "a ", "a|b",
     "a/b", "a\\b", "a\0b", "a\nb", "", "CONIN$"],
)  # fmt: skip
def test_names_that_some_system_does_not_take(name: str) -> None:
    assert not is_portable(name)


@pytest.mark.parametrize("name", ["nulls", "console.txt", "COM10", "a.b", "ü", ".hidden", "com", "a b"])
def test_names_that_every_system_takes(name: str) -> None:
    assert is_portable(name)


def test_text_files_that_differ_in_case_alone_clash_where_case_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [Item(str(tmp_path / name)) for name in ("A.png", "a.jpg", "ü.png", "u\u0308.jpg", "b.png")]
    assert Sidecars().clashes(items) == {}  # Linux
    monkeypatch.setattr("qvl.runtime.caption.sidecar.ignores_case", lambda folder: True)
    assert Sidecars().clashes(items) == {items[1].path: items[0].path, items[3].path: items[2].path}


def test_whether_case_is_ignored_is_seen_by_looking(tmp_path: Path) -> None:
    folder = tmp_path / "Folder"
    folder.mkdir()
    assert not ignores_case(folder / "not" / "there")
    (tmp_path / "fOLDER").symlink_to(folder)  # stands in for a file system that takes both names for one
    assert ignores_case(folder / "not" / "there")


@pytest.mark.parametrize("folder", [default_directory, state_dir])
def test_a_user_without_a_home(folder: object, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("XDG_CACHE_HOME", "XDG_STATE_HOME"):
        monkeypatch.setenv(variable, "relative")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(InputError, match="no home folder"):
        folder()  # type: ignore[operator]
