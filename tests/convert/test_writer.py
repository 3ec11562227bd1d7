"""What is left on disk, whatever happens."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from support.checkpoint import Shape, Style, write_checkpoint

from qvl.convert import Converted, convert, writer
from qvl.convert.recipe import TEXT_RECIPES
from qvl.runtime.errors import InputError, OutputError, QvlError
from qvl.runtime.locks import Lock


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_names_follow_the_hubs_habit(tiny_checkpoint: Path, tmp_path: Path) -> None:
    done = convert(tiny_checkpoint, tmp_path / "deep" / "er", "Q4_K_M", "f16")
    assert (done.text.name, done.mmproj.name) == ("tiny-Q4_K_M.gguf", "mmproj-tiny-F16.gguf")
    assert listing(tmp_path / "deep" / "er") == ["mmproj-tiny-F16.gguf", "tiny-Q4_K_M.gguf"]
    other = convert(tiny_checkpoint, tmp_path, "bf16", "q8_0", name="My-VL")
    assert listing(tmp_path) == ["My-VL-BF16.gguf", "deep", "mmproj-My-VL-Q8_0.gguf"]
    assert other.text == tmp_path / "My-VL-BF16.gguf"


def test_existing_files_need_force(tiny_checkpoint: Path, tmp_path: Path) -> None:
    first = convert(tiny_checkpoint, tmp_path, "q8_0", "q8_0")
    before = first.text.read_bytes()
    first.mmproj.unlink()
    first.text.write_bytes(b"precious")
    with pytest.raises(OutputError, match=r"tiny-Q8_0\.gguf: exists") as caught:
        convert(tiny_checkpoint, tmp_path, "q8_0", "q8_0")
    assert "`force`" in str(caught.value.hint)
    assert first.text.read_bytes() == b"precious"
    assert listing(tmp_path) == ["tiny-Q8_0.gguf"]
    convert(tiny_checkpoint, tmp_path, "q8_0", "q8_0", force=True)
    assert first.text.read_bytes() == before


def test_too_little_disk_is_noticed_before_the_work(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("usage", (), {"free": 1_000_000})
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: usage)
    calls: list[str] = []
    with pytest.raises(OutputError, match=r": \d\d MB needed, 1 MB free"):
        convert(
            tiny_checkpoint, tmp_path, "f16", "f16", progress=lambda done, total, name: calls.append(name)
        )
    assert not calls
    assert listing(tmp_path) == []


class Stop(QvlError):
    """Raised from inside, to see what is left."""


@pytest.mark.parametrize("error", [KeyboardInterrupt, Stop, MemoryError])
def test_an_interrupt_leaves_nothing(
    tiny_checkpoint: Path, tmp_path: Path, error: Callable[[str], BaseException]
) -> None:
    calls = 0

    def interrupt(done: int, total: int, name: str) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise error("now")

    with pytest.raises(error):  # type: ignore[arg-type]
        convert(tiny_checkpoint, tmp_path, "q4_k_m", "q8_0", progress=interrupt)
    assert calls == 5
    assert listing(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_midway_leaves_nothing(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    real, calls = os.pwrite, 0

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls > 8:
            raise OSError(code, os.strerror(code))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(
        OutputError, match="the disk is full" if code == errno.ENOSPC else "cannot be written"
    ):
        convert(tiny_checkpoint, tmp_path, "f32", "f32")
    assert listing(tmp_path) == []


def test_short_writes_are_continued(
    tiny_checkpoint: Path, tiny_model: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:1001], offset))
    done = convert(tiny_checkpoint, tmp_path, "f32", "f32")
    assert done.text.read_bytes() == tiny_model.text.read_bytes()


def test_without_pwrite_the_result_is_the_same(
    tiny_checkpoint: Path, tiny_model: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows."""
    monkeypatch.delattr(os, "pwrite")
    done = convert(tiny_checkpoint, tmp_path, "f32", "f32")
    assert done.text.read_bytes() == tiny_model.text.read_bytes()
    assert done.mmproj.read_bytes() == tiny_model.mmproj.read_bytes()


def test_a_second_writer_is_refused_and_a_dead_ones_files_are_removed(
    tiny_checkpoint: Path, tiny_model: Converted, tmp_path: Path
) -> None:
    left = tmp_path / f".tiny-F32.gguf.{'0a' * 8}.part"
    left.write_bytes(b"x" * 10_000_000)
    with (
        Lock(tmp_path / "tiny-F32.gguf"),
        pytest.raises(OutputError, match=r"tiny-F32\.gguf: another run is writing to it"),
    ):
        convert(tiny_checkpoint, tmp_path, "f32", "f32")
    assert left.stat().st_size == 10_000_000
    done = convert(tiny_checkpoint, tmp_path, "f32", "f32")
    assert done.text.read_bytes() == tiny_model.text.read_bytes()
    assert listing(tmp_path) == ["mmproj-tiny-F32.gguf", "tiny-F32.gguf"]


def test_the_lock_is_held_until_after_the_rename(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, refused = writer.put_all_in_place, []

    def put_all_in_place(pairs: Sequence[tuple[Path, Path]]) -> None:
        for step in (lambda: None, lambda: real(pairs)):
            step()
            with pytest.raises(OutputError, match="another run"):
                Lock(pairs[1][1])
            refused.append(step)

    monkeypatch.setattr(writer, "put_all_in_place", put_all_in_place)
    convert(tiny_checkpoint, tmp_path, "f32", "f32")
    assert len(refused) == 2


def test_a_rename_that_fails_leaves_no_mixed_pair(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = convert(tiny_checkpoint, tmp_path, "f32", "f32")
    for path in (done.text, done.mmproj):
        path.write_bytes(b"old " + path.name.encode())
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        if Path(target) == done.mmproj and Path(source).stat().st_size > 1000:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OutputError, match="cannot be written"):
        convert(tiny_checkpoint, tmp_path, "f32", "f32", force=True)
    assert done.text.read_bytes() == b"old tiny-F32.gguf"
    assert done.mmproj.read_bytes() == b"old mmproj-tiny-F32.gguf"
    assert listing(tmp_path) == ["mmproj-tiny-F32.gguf", "tiny-F32.gguf"]


def test_a_folder_that_cannot_be_made(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be written"):
        convert(tiny_checkpoint, tmp_path / "file" / "out", "f32", "f32")


def test_ctrl_c_in_a_real_process(tmp_path: Path) -> None:
    """SIGINT while workers are quantizing: quick, silent, and nothing left."""
    shape = Shape(hidden=256, inner=4096, layers=16, depth=1, vocab_size=288)
    folder = write_checkpoint(tmp_path / "c", shape, Style(tokenizer="bytes", dtype="BF16"))
    code = f"""
        from qvl.convert import convert
        started = lambda done, total, name: print("started", flush=True)
        try:
            convert({str(folder)!r}, {str(tmp_path / "out")!r}, "iq4_xs", "f32", progress=started)
        except KeyboardInterrupt:
            print("interrupted")
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert out.splitlines()[-1] == "interrupted", err
    assert listing(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("name", "meant"),
    [("q4km", "q4_k_m?"), ("Q8-0", "q8_0?"), ("q4_k", "q4_k_s or q4_k_m?"), ("int8", "one of f32, f16")],
)
def test_what_was_meant_by_a_type(name: str, meant: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        convert(tmp_path, tmp_path, name)
    assert meant in str(caught.value.hint)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_type": "q9_0"}, "unknown text type 'q9_0'"),
        ({"vision_type": "q4_k_m"}, "unknown vision type 'q4_k_m'"),
        ({"tensor_types": ["attn_v"]}, "'attn_v'"),
        ({"tensor_types": ["(=q8_0"]}, r"'\(=q8_0'"),
        ({"tensor_types": ["attn_v=q99"]}, "unknown tensor type 'q99'"),
        ({"tensor_types": ["attn_v"]}, "tensor type 'attn_v' names no tensor"),
        ({"token_embedding_type": "x"}, "unknown tensor type 'x'"),
    ],
)
def test_unknown_types_are_refused_first(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        convert(tmp_path / "missing", tmp_path, **options)  # type: ignore[arg-type]
    assert caught.value.hint
    assert "q4_k_m" in TEXT_RECIPES


@pytest.mark.parametrize("name", ["../up", "a/b", "a\\b", "a\0b"])
def test_a_name_with_a_folder_is_refused(tiny_checkpoint: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"cannot be a file's name|name holds a NUL character"):
        convert(tiny_checkpoint, tmp_path / "out", name=name)
    assert not (tmp_path / "out").exists()
