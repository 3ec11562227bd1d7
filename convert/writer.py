"""GGUF files written in place of nothing: a temporary name first, the real one at the end.

The header (gguf package) knows every size before the first weight is read, so that tensor data can be
written in any order by any thread. Whatever goes wrong, and an interrupt too, leaves no file behind.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Final

import gguf
import numpy as np

from qvl.convert.metadata import Metadata, Value
from qvl.convert.recipe import Planned
from qvl.runtime.errors import OutputError

ALIGNMENT: Final = 32  # GGUF_DEFAULT_ALIGNMENT
HEADER_ROOM: Final = 16 << 20  # a Qwen2 vocabulary takes six megabytes
PARTIAL: Final = ".partial"
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class OutputFile:
    """One GGUF file being written; made by `output_files`.

    Attributes:
        path: the final name.
        offsets: where each tensor's data goes, in bytes from the start of the file, by name.
    """

    def __init__(self, path: Path, arch: str, metadata: Metadata, tensors: Sequence[Planned]) -> None:
        self.path = path
        self.partial = path.with_name(f".{path.name}{PARTIAL}")
        self.offsets: dict[str, int] = {}
        self._lock = threading.Lock()
        self._file = self._open()
        try:
            self._write_header(arch, metadata, tensors)
        except BaseException:
            self.discard()
            raise

    def write_at(self, offset: int, data: memoryview) -> None:
        """Write bytes at an offset; may be called from any thread.

        Raises:
            OSError: the disk is full, or another failure.
        """
        if hasattr(os, "pwrite"):
            while len(data):
                written = os.pwrite(self._file.fileno(), data, offset)
                data, offset = data[written:], offset + written
            return
        with self._lock:  # Windows
            self._file.seek(offset)
            self._file.write(data)
            self._file.flush()

    def finish(self) -> None:
        """Make the content durable; the file still has its temporary name."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def discard(self) -> None:
        """Close and remove what was written."""
        with suppress(OSError):
            self._file.close()
        with suppress(OSError):
            self.partial.unlink(missing_ok=True)

    def _open(self) -> BinaryIO:
        # Not truncated on opening: another process may be writing it, which only the lock tells.
        number = os.open(self.partial, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        file = os.fdopen(number, "r+b")
        try:
            import fcntl

            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows does not let two processes open it for writing
            pass
        except OSError as error:
            file.close()
            raise OutputError(
                f"{self.path}: is being written by another process",
                hint="wait for it, or choose another folder",
            ) from error
        file.truncate(0)  # left by a process that was killed
        return file

    def _write_header(self, arch: str, metadata: Metadata, tensors: Sequence[Planned]) -> None:
        logging.getLogger("gguf.gguf_writer").setLevel(logging.WARNING)
        writer = gguf.GGUFWriter(None, arch)
        for key, value in metadata.items():
            _add(writer, key, value)
        for planned in tensors:
            writer.add_tensor_info(
                planned.tensor.name,
                planned.tensor.shape,
                np.dtype(np.float32),  # not looked at, since raw_dtype is given
                planned.nbytes,
                raw_dtype=gguf.GGMLQuantizationType(int(planned.type)),
            )
        writer.fout, writer.state = [self._file], gguf.gguf_writer.WriterState.EMPTY
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        at = _padded(self._file.tell())
        for planned in tensors:
            self.offsets[planned.tensor.name] = at
            at = _padded(at + planned.nbytes)
        os.truncate(self._file.fileno(), at)  # gaps between tensors read as zeros


@contextmanager
def output_files(
    wanted: Sequence[tuple[Path, str, Metadata, Sequence[Planned]]], *, force: bool
) -> Iterator[list[OutputFile]]:
    """Files to fill inside the block: (path, architecture, metadata, tensors) each.

    They get their names together when the block ends well; on any exception all are removed.

    Args:
        force: overwrite files that exist.

    Raises:
        OutputError: a file exists, the folder cannot be written, or the disk is full: before the block
            where it can be known, from within it otherwise.
    """
    paths = [path for path, *_ in wanted]
    check_outputs(paths, sum(file_size(tensors) for *_, tensors in wanted), force=force)
    files: list[OutputFile] = []
    try:
        for path, arch, metadata, tensors in wanted:
            files.append(OutputFile(path, arch, metadata, tensors))
        yield files
        for file in files:
            file.finish()
        for file in files:
            file.partial.replace(file.path)
    except OSError as error:
        raise _output_error(error, paths[0].parent) from error
    finally:
        for file in files:
            file.discard()


def check_outputs(paths: Sequence[Path], nbytes: int, *, force: bool) -> None:
    """Refuse before the work starts what would fail after it.

    Raises:
        OutputError: a path exists (unless force), its folder cannot be made, or has less than nbytes free.
    """
    for path in paths:
        if path.is_dir() or (path.exists() and not force):
            raise OutputError(f"{path}: exists", hint="use --force to overwrite it, or choose another folder")
    folder = paths[0].parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise _output_error(error, folder) from error
    if free < nbytes:
        raise OutputError(
            f"{folder}: {readable(nbytes)} needed, {readable(free)} free",
            hint="free some space, choose another folder, or a smaller type",
        )


def file_size(tensors: Sequence[Planned]) -> int:
    """Bytes of a file, its header estimated from above."""
    return HEADER_ROOM + sum(_padded(planned.nbytes) for planned in tensors)


def readable(nbytes: int) -> str:
    """Bytes as people write them: "1.23 GB", "45 MB"."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 10**9 else f"{nbytes / 1e6:.0f} MB"


def _output_error(error: OSError, folder: Path) -> OutputError:
    if error.errno in _FULL:
        return OutputError(
            f"{folder}: the disk is full", hint="free some space and run again; nothing was left behind"
        )
    return OutputError(f"{error.filename or folder}: cannot be written: {error.strerror or error}")


def _padded(n: int) -> int:
    return (n + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


def _add(writer: Any, key: str, value: Value) -> None:
    """Add a key with the GGUF type that its Python type stands for."""
    kinds = gguf.GGUFValueType
    for python_type, kind in (
        (bool, kinds.BOOL),  # before int, which bool is
        (np.int32, kinds.INT32),
        (int, kinds.UINT32),
        (float, kinds.FLOAT32),
        (str, kinds.STRING),
    ):
        if isinstance(value, python_type):
            writer.add_key_value(key, int(value) if isinstance(value, np.int32) else value, kind)
            return
    writer.add_array(key, value)
