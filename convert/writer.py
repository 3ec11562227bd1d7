"""Writes the GGUF files of a conversion: under temporary names first, renamed together at the end.

The header (gguf package) knows every size before the first weight is read, so tensor data can be written in
any order by any thread. Any failure, an interrupt included, leaves no file behind.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np

from qvl.convert.family import Metadata, Value
from qvl.convert.recipe import Planned
from qvl.runtime.atomic import create_temporary, put_all_in_place, remove_leftovers, sync, write_error
from qvl.runtime.errors import OutputError
from qvl.runtime.locks import Lock

ALIGNMENT: Final = 32  # GGUF_DEFAULT_ALIGNMENT
HEADER_ROOM: Final = 16 << 20  # a Qwen2 vocabulary takes six megabytes


class OutputFile:
    """One GGUF file being written; made by `output_files`.

    Attributes:
        path: the final name.
        offsets: where each tensor's data goes, in bytes from the start of the file, by name.
    """

    def __init__(self, path: Path, arch: str, metadata: Metadata, tensors: Sequence[Planned]) -> None:
        self.path = path
        self.offsets: dict[str, int] = {}
        self._lock = threading.Lock()
        self._file, self.temporary = create_temporary(path)
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
        sync(self._file.fileno())
        self._file.close()

    def discard(self) -> None:
        """Close and remove what was written."""
        with suppress(OSError):
            self._file.close()
        with suppress(OSError):
            self.temporary.unlink(missing_ok=True)

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
        self._file.truncate(at)  # gaps between tensors read as zeros


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
    with ExitStack() as locks:
        for path in paths:
            locks.enter_context(Lock(path))
        _refuse_existing(paths, force)  # again: the run that held the lock may have written them
        try:
            for path, arch, metadata, tensors in wanted:
                remove_leftovers(path)
                files.append(OutputFile(path, arch, metadata, tensors))
            yield files
            for file in files:
                file.finish()
            put_all_in_place([(file.temporary, file.path) for file in files])
        except OSError as error:
            raise write_error(Path(error.filename or paths[0].parent), error) from error
        finally:
            for file in files:
                file.discard()


def check_outputs(paths: Sequence[Path], nbytes: int, *, force: bool) -> None:
    """Refuse before the work starts what would fail after it.

    Raises:
        OutputError: a path exists (unless force), its folder cannot be made, or has less than nbytes free.
    """
    _refuse_existing(paths, force)
    folder = paths[0].parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise write_error(Path(error.filename or folder), error) from error
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


def _refuse_existing(paths: Sequence[Path], force: bool) -> None:
    for path in paths:
        if path.is_dir() or (path.exists() and not force):
            raise OutputError(f"{path}: exists", hint="`force` overwrites it; or choose another folder")


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
