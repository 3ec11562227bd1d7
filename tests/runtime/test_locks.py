"""A second writer is refused wherever the file lies, and a dead one's lock is no obstacle."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qvl.runtime.errors import OutputError
from qvl.runtime.locks import Lock, beside

HOLDER = """
import sys
from pathlib import Path
from qvl.runtime.locks import Lock
{without}
lock = Lock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""
WITHOUT_FLOCK = """
import errno, fcntl, os
def flock(handle, how):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
fcntl.flock = flock
"""


@pytest.fixture(params=["flock", "ENOLCK", "EOPNOTSUPP", "EINVAL", "ENOSYS"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How this file system locks, or with which error it does not."""
    name = str(request.param)
    if name != "flock":
        fcntl = pytest.importorskip("fcntl")
        code = getattr(errno, name)

        def flock(handle: int, how: int) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(fcntl, "flock", flock)
    return name


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Callable[[bool], subprocess.Popen[str]]]:
    """Start a process that holds the lock of `out`, on a file system with locks or without."""
    started: list[subprocess.Popen[str]] = []

    def start(flock: bool) -> subprocess.Popen[str]:
        code = HOLDER.format(without="" if flock else WITHOUT_FLOCK)
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "out")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_lock_is_refused_and_the_file_goes_with_the_first(way: str, tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    for _ in range(2):
        with Lock(target), pytest.raises(OutputError, match=r"out\.jsonl: another run is writing to it"):
            Lock(target)
        assert not list(tmp_path.iterdir())


def test_another_process_is_refused_until_it_is_gone(
    tmp_path: Path, holder: Callable[[bool], subprocess.Popen[str]]
) -> None:
    process = holder(True)
    with pytest.raises(OutputError, match="another run is writing to it") as caught:
        Lock(tmp_path / "out")
    assert "cannot lock" not in str(caught.value)
    process.kill()
    process.wait()
    Lock(tmp_path / "out").release()


@pytest.mark.parametrize("way", ["ENOLCK"], indirect=True)
def test_without_locks_the_holder_is_named_and_a_dead_one_recognized(
    way: str, tmp_path: Path, holder: Callable[[bool], subprocess.Popen[str]]
) -> None:
    process = holder(False)
    with pytest.raises(OutputError) as caught:
        Lock(tmp_path / "out")
    said = str(caught.value)
    assert f"process {process.pid} on '{socket.gethostname()}'" in said
    assert "this file system cannot lock" in said
    assert f"remove {tmp_path / '.out.lock.pid'}" in str(caught.value.hint)
    process.kill()
    process.wait()
    Lock(tmp_path / "out").release()


@pytest.mark.parametrize("way", ["ENOLCK"], indirect=True)
def test_a_lock_of_another_host_stays_and_is_named(way: str, tmp_path: Path) -> None:
    (tmp_path / ".out.lock.pid").write_text("12345\nelsewhere.example\n")
    with pytest.raises(OutputError, match=r"process 12345 on 'elsewhere\.example'"):
        Lock(tmp_path / "out")
    assert (tmp_path / ".out.lock.pid").exists()


def test_a_folder_that_cannot_be_written_is_not_called_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(path: str, flags: int, *rest: int, **more: int) -> int:
        if flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OutputError, match="out: cannot be written: Permission denied"):
        Lock(tmp_path / "out")


def test_a_link_as_the_lock_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / ".out.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="cannot be written"):
        Lock(tmp_path / "out")
    assert not (tmp_path / "elsewhere").exists()


def test_a_lock_file_that_was_removed_meanwhile_is_locked_anew(tmp_path: Path) -> None:
    """The race that makes two holders: the second has the file open when the first removes it."""
    fcntl = pytest.importorskip("fcntl")
    first = Lock(tmp_path / "out")
    real, calls = fcntl.flock, []

    def flock(handle: int, how: int) -> None:
        if not calls and how & fcntl.LOCK_NB:
            calls.append(os.fstat(handle).st_ino)
            first.release()
        real(handle, how)

    fcntl.flock = flock
    try:
        with Lock(tmp_path / "out"):
            assert (tmp_path / ".out.lock").stat().st_nlink == 1
            with pytest.raises(OutputError):
                Lock(tmp_path / "out")
    finally:
        fcntl.flock = real
    assert calls


def test_the_names_beside_long_ones_differ() -> None:
    names = {beside(Path("x" * 254 + last), ".lock").name for last in "ab"}
    assert len(names) == 2
    assert max(map(len, names)) < 255 - len(".pid")
    assert beside(Path("f/a.csv"), ".lock") == Path("f/.a.csv.lock")
