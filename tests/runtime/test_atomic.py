"""Files appear whole or not at all, and never through a link that somebody else placed."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path

import pytest

from qvl.runtime import atomic
from qvl.runtime.atomic import (
    PRIVATE,
    put_all_in_place,
    remove_leftovers,
    replacing,
    sync,
    write_error,
    write_whole,
)


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    write_whole(path, "grün \udcff")  # a stray byte of a file name
    assert path.read_bytes() == "grün ".encode() + b"\xff"
    assert listing(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError])
def test_a_failure_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), replacing(path) as file:
        file.write(b"half")
        raise error
    assert path.read_text() == "old"
    assert listing(tmp_path) == ["a.txt"]


def test_permissions(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_whole(tmp_path / "shared", b"")
        write_whole(tmp_path / "private", b"", mode=PRIVATE)
    finally:
        os.umask(before)
    if os.name == "posix":
        assert [(tmp_path / n).stat().st_mode & 0o777 for n in ("shared", "private")] == [0o644, 0o600]


def test_a_link_in_the_place_of_the_temporary_file_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even for somebody who guesses the name."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    monkeypatch.setattr(secrets, "token_hex", lambda n: "00" * n)
    (tmp_path / f".a.txt.{'00' * 8}.part").symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_whole(tmp_path / "a.txt", b"x")
    assert victim.read_text() == "precious"


def test_a_link_as_the_target_is_replaced_itself(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "a.txt").symlink_to(victim)
    write_whole(tmp_path / "a.txt", b"x")
    assert victim.read_text() == "precious"
    assert not (tmp_path / "a.txt").is_symlink()


def test_a_name_as_long_as_names_can_be(tmp_path: Path) -> None:
    path = tmp_path / ("ü" * 127)
    write_whole(path, b"x")
    assert listing(tmp_path) == [path.name]


def refusing(n_times: int) -> tuple[list[int], object]:
    """An os.replace as that of Windows while another program has the target open."""
    real, calls = os.replace, []

    def replace(source: Path, target: Path) -> None:
        calls.append(1)
        if len(calls) <= n_times:
            error = PermissionError(errno.EACCES, "Access is denied", str(source))
            error.winerror = 5  # type: ignore[attr-defined]
            raise error
        real(source, target)

    return calls, replace


def test_a_file_that_is_open_for_a_moment_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, replace = refusing(2)
    monkeypatch.setattr(os, "replace", replace)
    write_whole(tmp_path / "a", b"new")
    assert len(calls) == 3
    assert (tmp_path / "a").read_bytes() == b"new"


def test_a_file_that_stays_open_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "replace", refusing(99)[1])
    with pytest.raises(PermissionError) as caught:
        write_whole(path, b"new")
    assert str(write_error(path, caught.value)) == f"{path}: cannot be written: another program has it open"
    assert path.read_bytes() == b"old"
    assert listing(tmp_path) == ["a"]


@pytest.mark.parametrize("fails_at", [0, 1, 2, 3, None])
def test_a_pair_is_replaced_together_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int | None
) -> None:
    pairs = []
    for name in ("a", "b"):
        (tmp_path / name).write_text(f"old {name}")
        (tmp_path / f"{name}.new").write_text(f"new {name}")
        pairs.append((tmp_path / f"{name}.new", tmp_path / name))
    real, calls = os.replace, 0

    def replace(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls - 1 == fails_at:
            raise OSError(errno.EIO, "Input/output error", str(source))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    if fails_at is None:
        put_all_in_place(pairs)
    else:
        with pytest.raises(OSError, match="Input/output"):
            put_all_in_place(pairs)
    state = "new" if fails_at is None else "old"
    assert [path.read_text() for _, path in pairs] == [f"{state} a", f"{state} b"]
    assert not [name for name in listing(tmp_path) if name.endswith(".part")]


def test_only_leftovers_of_the_path_are_removed(tmp_path: Path) -> None:
    kept = [".a.txt.part", f".b.txt.{'0' * 16}.part", f".a.txt.{'g' * 16}.part"]
    for name in (*kept, f".a.txt.{'0' * 16}.part"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path / "a.txt")
    assert listing(tmp_path) == sorted(kept)
    remove_leftovers(tmp_path / "missing" / "a.txt")


def test_a_file_system_without_fsync_is_accepted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fsync(code: int) -> object:
        def fail(handle: int) -> None:
            raise OSError(code, os.strerror(code))

        return fail

    with (tmp_path / "a").open("wb") as file:
        monkeypatch.setattr(os, "fsync", fsync(errno.EINVAL))
        sync(file.fileno())
        monkeypatch.setattr(os, "fsync", fsync(errno.EIO))
        with pytest.raises(OSError, match="Input/output"):
            sync(file.fileno())


def test_macos_flushes_the_drive_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []

    class Fcntl:
        F_FULLFSYNC = 51

        @staticmethod
        def fcntl(handle: int, command: int) -> None:
            calls.append((handle, command))

    monkeypatch.setattr(atomic, "fcntl", Fcntl)
    with (tmp_path / "a").open("wb") as file:
        sync(file.fileno())
        assert calls == [(file.fileno(), 51)]


def test_errors_name_the_file_and_what_to_do() -> None:
    full = write_error(Path("a"), OSError(errno.ENOSPC, "No space left"), note="; 3 records are safe")
    assert str(full) == "a: the disk is full; 3 records are safe"
    assert "free some space" in str(full.hint)
    other = write_error(Path("a"), PermissionError(errno.EACCES, "Permission denied"), hint="do that")
    assert (str(other), other.hint) == ("a: cannot be written: Permission denied", "do that")
