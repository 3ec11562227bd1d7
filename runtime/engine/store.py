"""Pictures and videos by what they are: their place in the prompt, and their embeddings while they last."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qvl.runtime.engine.units import Unit, VisionUnit
from qvl.runtime.errors import InputError
from qvl.runtime.prompt.chatml import Chunk, TextChunk
from qvl.runtime.prompt.messages import VisionChunk
from qvl.runtime.prompt.positions import VisionSpan
from qvl.runtime.vision.cache import EmbeddingCache, embedding_key
from qvl.runtime.vision.encoder import VisionEmbedding
from qvl.runtime.vision.grid import merged
from qvl.runtime.vision.preprocess import Patches

MAX_BYTES: Final = 256 << 20
_MAX_UNITS: Final = 4096
Watch: TypeAlias = Callable[[float], bool | None]
"""Called with the fraction done; returning False stops."""


class VisionBackend(Protocol):
    """What makes embeddings (`qvl.runtime.model` has it over the encoder)."""

    merge_size: int

    @property
    def identity(self) -> str:
        """Of what decides the embeddings of given patches; see `qvl.runtime.vision.cache.embedding_key`."""

    def prepare(self, chunk: VisionChunk, progress: Watch | None = None) -> Patches:
        """Read a picture or video and cut it into patches; progress is that of a video's frames."""

    def encode_patches(
        self, inputs: Sequence[Patches], progress: Watch | None = None
    ) -> list[VisionEmbedding]:
        """Embeddings of what was prepared."""


class EmbeddingStore:
    """Finds a source's unit, and its embeddings, encoding only what it has not got.

    Units outlive embeddings, which go, least recently used first, when they take more than `max_bytes`: a
    picture that the KV cache still holds is not looked at again.

    Attributes:
        n_encoded: pictures and videos encoded so far.
    """

    def __init__(
        self, backend: VisionBackend | None, max_bytes: int = MAX_BYTES, cache: EmbeddingCache | None = None
    ) -> None:
        """cache: where embeddings are looked for before they are made, and kept for other processes."""
        self._backend = backend
        self._max_bytes = max_bytes
        self._cache = cache
        self._units: dict[str, VisionUnit] = {}
        self._patches: dict[str, Patches] = {}
        self._embeddings: OrderedDict[str, NDArray[np.float32]] = OrderedDict()
        self._sources: dict[str, VisionChunk] = {}
        self._thread: threading.Thread | None = None
        self._called_off = threading.Event()
        self._early: set[str] = set()
        self.n_encoded = 0

    def look_ahead(self, wanted: Callable[[], Iterable[VisionChunk]]) -> None:
        """Begin to encode in a thread; whoever uses the store next waits for its end.

        Args:
            wanted: says what is likely to be asked about; called in the thread.
        """

        def work() -> None:
            # what cannot be read says so when the prompt that names it is read
            with suppress(Exception):
                units = [self._unit(chunk, None) for chunk in wanted()]
                self._early.update(self._make(units, lambda _: not self._called_off.is_set()))

        self._thread = threading.Thread(target=work, name="qvl-look-ahead", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Call off what is encoded ahead."""
        self._called_off.set()
        self._settle()

    def _settle(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def units(self, chunks: Iterable[Chunk], progress: Watch | None = None) -> list[Unit]:
        """The sequence that a prompt's chunks make in the KV cache; see `unit`."""
        units: list[Unit] = []
        for chunk in chunks:
            if isinstance(chunk, TextChunk):
                units.extend(chunk.tokens)
            else:
                units.append(self.unit(chunk, progress))
        return units

    def unit(self, chunk: VisionChunk, progress: Watch | None = None) -> VisionUnit:
        """Where a picture or video stands; it is read, but not yet encoded.

        Args:
            progress: of the frames of a video.

        Raises:
            InputError: there is no image encoder, or the source cannot be read.
            Cancelled: progress returned False.
        """
        self._settle()
        return self._unit(chunk, progress)

    def _unit(self, chunk: VisionChunk, progress: Watch | None) -> VisionUnit:
        key = source_key(chunk)
        self._sources[key] = chunk
        if key not in self._units:
            patches = self._prepare(chunk, progress)
            span = VisionSpan(*merged(patches.grid_thw, self._need_backend().merge_size))
            if sum(p.pixel_values.nbytes for p in self._patches.values()) < self._max_bytes:
                self._patches[key] = patches
            self._units[key] = VisionUnit(key, span)
        return self._units[key]

    def encode(self, units: Iterable[VisionUnit], progress: Watch | None = None) -> None:
        """Make the embeddings of units ready, those that are missing in one go.

        Raises:
            Cancelled: progress returned False.
        """
        self._settle()
        units = list(units)
        early = self._early.intersection(unit.key for unit in units)
        self._early -= early
        self.n_encoded += len(early) + len(self._make(units, progress))

    def _make(self, units: Iterable[VisionUnit], progress: Watch | None) -> list[str]:
        """Encode those that are missing, and say which."""
        missing = [key for key in dict.fromkeys(u.key for u in units) if key not in self._embeddings]
        patches: dict[str, Patches] = {}
        if missing:
            patches = {key: self._patches.get(key) or self._prepare(self._sources[key]) for key in missing}
            if self._cache is not None:
                self._take_cached(self._cache, patches)
            made = self._need_backend().encode_patches([*patches.values()], progress) if patches else []
            for key, embedding in zip(patches, made, strict=True):
                self._embeddings[key] = embedding.embeddings
                if self._cache is not None:
                    self._cache.put(embedding_key(patches[key], self._need_backend().identity), embedding)
        return [*patches]

    def _take_cached(self, cache: EmbeddingCache, patches: dict[str, Patches]) -> None:
        """Move what the cache has from patches to the embeddings."""
        for key in list(patches):
            found = cache.get(embedding_key(patches[key], self._need_backend().identity))
            if found is not None:
                self._embeddings[key] = found.embeddings
                del patches[key]

    def embeddings(self, unit: VisionUnit) -> NDArray[np.float32]:
        """float32 [n_tokens, n_embd] of a unit that `encode` has made ready."""
        self._embeddings.move_to_end(unit.key)
        return self._embeddings[unit.key]

    def trim(self) -> None:
        """Let go of the sources, and of what is over the bounds; call it when a prompt is done with."""
        self._sources.clear()
        self._patches.clear()
        for key in list(self._units)[: max(0, len(self._units) - _MAX_UNITS)]:
            del self._units[key]
        size = sum(e.nbytes for e in self._embeddings.values())
        while size > self._max_bytes and len(self._embeddings) > 1:
            size -= self._embeddings.popitem(last=False)[1].nbytes

    def _prepare(self, chunk: VisionChunk, progress: Watch | None = None) -> Patches:
        return self._need_backend().prepare(chunk, progress)

    def _need_backend(self) -> VisionBackend:
        if self._backend is None:
            raise InputError(
                "this model was opened without an image encoder",
                hint="pass its mmproj file (`mmproj`), or put it into the model's folder",
            )
        return self._backend


def source_key(chunk: VisionChunk) -> str:
    """What identifies a source: a file by path, size and time, without reading it; data by its content."""
    digest = hashlib.blake2b(f"{chunk.kind} {chunk.options}".encode(), digest_size=16)
    _add(digest, chunk.source)
    return digest.hexdigest()


def _add(digest: Any, source: Any) -> None:
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        digest.update(os.fsencode(path.absolute()))
        if path.is_dir():
            for entry in sorted(path.iterdir()):
                _add_stat(digest, entry)
        else:
            _add_stat(digest, path)
    elif isinstance(source, bytes | bytearray | memoryview):
        digest.update(b"bytes")
        digest.update(source)
    elif isinstance(source, list | tuple):
        digest.update(f"list {len(source)}".encode())
        for item in source:
            _add(digest, item)
    elif isinstance(source, np.ndarray):
        digest.update(f"{source.dtype} {source.shape}".encode())
        digest.update(np.ascontiguousarray(source).data)
    elif hasattr(source, "tobytes") and hasattr(source, "mode"):  # a PIL image
        turned = source.getexif().get(0x0112)
        digest.update(f"{source.mode} {source.size} {turned} {source.getpalette()}".encode())
        digest.update(source.tobytes())
    else:
        digest.update(repr(source).encode())


def _add_stat(digest: Any, path: Path) -> None:
    try:
        stat = path.stat()
    except OSError:
        return  # reading it will say what is wrong
    digest.update(os.fsencode(path.name))
    digest.update(f" {stat.st_ino} {stat.st_size} {stat.st_mtime_ns}".encode())
