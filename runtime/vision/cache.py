"""Cache of embeddings from one run to the next: a known picture is not encoded again.

In memory as float32; on disk as float16, at half the size and a relative error of 2e-4, in safetensors files:
8 bytes of header length, a JSON header, the data (github.com/huggingface/safetensors, README, "Format").
Both are bounded; what was used longest ago goes first.

Any number of processes may share a directory: files appear whole, by renaming, and one that is damaged or
gone is as one that never was. Nothing here raises for the state of the disk: a cache that fails is slow, not
wrong.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import struct
import threading
import time
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qvl.runtime.atomic import PRIVATE, replacing
from qvl.runtime.files import parse_json
from qvl.runtime.vision.preprocess import Patches

Grid: TypeAlias = tuple[int, int, int]

MAX_BYTES = 1 << 30
"""On disk; about 300 pictures of 1024 tokens for the 2B model."""

MEMORY_BYTES = 256 << 20

_VERSION = "1"  # of what a file means; goes into every key
_KEY = re.compile(r"[0-9a-f]{64}")
_SUFFIX = ".safetensors"
_TYPES: dict[str, np.dtype[Any]] = {"F16": np.dtype("<f2"), "F32": np.dtype("<f4")}
_LARGEST_F16 = 65504.0
_STALE_SECONDS = 3600.0  # a temporary file of this age belongs to a process that was killed


class Embedding(Protocol):
    """An embedding to keep: `qvl.runtime.vision.encoder.VisionEmbedding`, and `CachedEmbedding` below."""

    @property
    def embeddings(self) -> NDArray[np.float32]: ...
    @property
    def grid_thw(self) -> Grid: ...


@dataclass(frozen=True)
class CachedEmbedding:
    """An embedding from the cache.

    Attributes:
        embeddings: float32 [n_tokens, n_embd], not to be written to.
        grid_thw: (t, h, w) in patches.
    """

    embeddings: NDArray[np.float32]
    grid_thw: Grid


@dataclass(frozen=True)
class CacheStats:
    """Size of a cache, with hits and misses since it was opened."""

    directory: Path | None
    entries: int
    n_bytes: int
    max_bytes: int
    memory_entries: int
    memory_n_bytes: int
    memory_bytes: int
    memory_hits: int
    disk_hits: int
    misses: int


def embedding_key(patches: Patches, identity: str) -> str:
    """The key of an encoder's embeddings of patches.

    The patches are the picture's pixels after all preprocessing, so bounds, mean and the like are in it.

    Args:
        patches: what goes into the encoder.
        identity: of the encoder: `file_identity` of the mmproj, and whatever else changes what it makes.
    """
    digest = hashlib.sha256(f"qvl {_VERSION} {identity} {patches.grid_thw} ".encode())
    digest.update(np.ascontiguousarray(patches.pixel_values).data)
    return digest.hexdigest()


class EmbeddingCache:
    """Embeddings by key, in memory and on disk. Safe for threads and for several processes.

    Args:
        directory: where files are kept, made when the first is; None keeps none.
        max_bytes: bound of the files together.
        memory_bytes: bound of the arrays in memory together.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | None,
        max_bytes: int = MAX_BYTES,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        self._directory = None if directory is None else Path(directory)
        self._max_bytes = max_bytes
        self._memory_bytes = memory_bytes
        self._memory: OrderedDict[str, CachedEmbedding] = OrderedDict()
        self._held = 0
        self._hits = {"memory": 0, "disk": 0, "none": 0}
        self._lock = threading.Lock()

    def get(self, key: str) -> CachedEmbedding | None:
        """The embeddings of a key, or None."""
        with self._lock:
            entry = self._memory.get(key)
            if entry is not None:
                self._memory.move_to_end(key)
                self._hits["memory"] += 1
                return entry
        entry = self._read(key)
        with self._lock:
            self._hits["none" if entry is None else "disk"] += 1
            if entry is not None:
                self._remember(key, entry)
        return entry

    def put(self, key: str, embedding: Embedding) -> None:
        """Keep embeddings; what does not fit in either bound is not kept there."""
        values = np.ascontiguousarray(embedding.embeddings, np.float32).view()
        values.flags.writeable = False
        t, h, w = embedding.grid_thw
        with self._lock:
            self._remember(key, CachedEmbedding(values, (t, h, w)))
        self._write(key, values, (t, h, w))

    def clear(self) -> int:
        """Remove everything, entries of other processes too; returns the bytes freed on disk."""
        with self._lock:
            self._memory.clear()
            self._held = 0
        freed = 0
        for path, size, _ in self._files():
            if _remove(path):
                freed += size
        return freed

    def stats(self) -> CacheStats:
        """Its size now, with hits and misses."""
        files = [size for path, size, _ in self._files() if path.suffix == _SUFFIX]
        with self._lock:
            hits = self._hits
            return CacheStats(
                directory=self._directory,
                entries=len(files),
                n_bytes=sum(files),
                max_bytes=self._max_bytes,
                memory_entries=len(self._memory),
                memory_n_bytes=self._held,
                memory_bytes=self._memory_bytes,
                memory_hits=hits["memory"],
                disk_hits=hits["disk"],
                misses=hits["none"],
            )

    def _remember(self, key: str, entry: CachedEmbedding) -> None:
        old = self._memory.pop(key, None)
        self._held -= 0 if old is None else old.embeddings.nbytes
        if entry.embeddings.nbytes > self._memory_bytes:
            return
        self._memory[key] = entry
        self._held += entry.embeddings.nbytes
        while self._held > self._memory_bytes:
            self._held -= self._memory.popitem(last=False)[1].embeddings.nbytes

    def _path(self, key: str) -> Path | None:
        if not _KEY.fullmatch(key):
            raise ValueError(f"{key!r} is no key: expected 64 hexadecimal digits")
        return None if self._directory is None else self._directory / (key + _SUFFIX)

    def _read(self, key: str) -> CachedEmbedding | None:
        path = self._path(key)
        if path is None:
            return None
        try:
            data = path.read_bytes()
        except OSError:
            return None
        try:
            entry = _decode(data, key)
        except (ValueError, KeyError, TypeError, struct.error, RecursionError):
            _remove(path)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # used now: the order in which files go
        return entry

    def _write(self, key: str, values: NDArray[np.float32], grid: Grid) -> None:
        path = self._path(key)
        if path is None:
            return
        parts = _encode(key, values, grid)
        if sum(map(len, parts)) > self._max_bytes:
            return
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # what is in pictures is private
            with replacing(path, mode=PRIVATE, durable=False) as file:  # a checksum tells a torn one
                file.writelines(parts)
        except OSError:  # a full or read-only disk
            return
        self._evict()

    def _evict(self) -> None:
        """Remove the least recently used entries until the rest is within the bound."""
        files = sorted(self._files(), key=lambda file: file[2])
        total = sum(size for path, size, _ in files if path.suffix == _SUFFIX)
        stale = time.time() - _STALE_SECONDS
        for path, size, used in files:
            if path.suffix != _SUFFIX:
                if used < stale:
                    _remove(path)
            elif total > self._max_bytes:
                _remove(path)
                total -= size

    def _files(self) -> list[tuple[Path, int, float]]:
        """Our files, temporary ones included: path, bytes, time of last use."""
        found = []
        try:
            with os.scandir(self._directory) if self._directory else contextlib.nullcontext(()) as entries:
                for entry in entries:
                    ours = _KEY.fullmatch(entry.name.removesuffix(_SUFFIX)) or entry.name.endswith(".part")
                    with contextlib.suppress(OSError):  # removed since by another process
                        if ours and entry.is_file(follow_symlinks=False):
                            stat = entry.stat(follow_symlinks=False)
                            found.append((Path(entry.path), stat.st_size, stat.st_mtime))
        except OSError:
            return []
        return found


def _encode(key: str, values: NDArray[np.float32], grid: Grid) -> tuple[bytes, bytes, memoryview]:
    """A safetensors file's parts. Values beyond float16's range are kept as float32."""
    peak = float(np.abs(values).max()) if values.size else 0.0
    kind = "F16" if peak <= _LARGEST_F16 else "F32"  # for NaN as well
    data = memoryview(values.astype(_TYPES[kind]).tobytes())
    tensor = {"dtype": kind, "shape": list(values.shape), "data_offsets": [0, len(data)]}
    metadata = {"key": key, "grid_thw": ",".join(map(str, grid))}
    metadata["crc32"] = _checksum(metadata, tensor, data)
    header = {"__metadata__": metadata, "embeddings": tensor}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the data, as safetensors' own writer does
    return struct.pack("<Q", len(text)), text, data


def _decode(data: bytes, key: str) -> CachedEmbedding:
    """Read a file back.

    Raises:
        ValueError, KeyError, TypeError, struct.error: the file is damaged or another's.
    """
    (length,) = struct.unpack_from("<Q", data)
    if length > len(data) - 8:
        raise ValueError("header beyond the file")
    header: Any = parse_json(data[8 : 8 + length])
    metadata, tensor = header["__metadata__"], header["embeddings"]
    body = memoryview(data)[8 + length :]
    if metadata["key"] != key or metadata["crc32"] != _checksum(metadata, tensor, body):
        raise ValueError("another's, or damaged")
    t, h, w = (int(x) for x in metadata["grid_thw"].split(","))
    n_tokens, n_embd = tensor["shape"]
    values = np.frombuffer(body, _TYPES[tensor["dtype"]]).reshape(n_tokens, n_embd).astype(np.float32)
    return CachedEmbedding(values, (t, h, w))


def _checksum(metadata: dict[str, str], tensor: dict[str, Any], data: memoryview) -> str:
    """Of everything that the entry is made from, in the header and after it."""
    fields = [metadata["grid_thw"], tensor["dtype"], tensor["shape"]]
    return str(zlib.crc32(data, zlib.crc32(json.dumps(fields).encode())))


def _remove(path: Path) -> bool:
    try:
        path.unlink()
    except OSError:  # another process was first, or has it open
        return False
    return True
