"""Caches each source's span in the prompt and its embeddings."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Protocol
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from qvl.runtime.engine.encoding import Encoded, EncodingSteps
from qvl.runtime.engine.place import placed
from qvl.runtime.engine.units import VisionUnit
from qvl.runtime.errors import Cancelled, InputError, Unpicklable
from qvl.runtime.prompt.messages import VisionChunk
from qvl.runtime.prompt.rules import Layout, Vision
from qvl.runtime.vision.cache import EmbeddingCache, embedding_key
from qvl.runtime.vision.encoder import VisionEmbedding
from qvl.runtime.vision.grid import merged
from qvl.runtime.vision.preprocess import Patches
from qvl.runtime.vision.video import Watch

MAX_BYTES: Final = 256 << 20
_MAX_EMBEDDINGS: Final = 256  # pictures; a server of a small model would take hours to come to MAX_BYTES
_MAX_UNITS: Final = 4096


class VisionBackend(Protocol):
    """Makes embeddings of pictures and videos (`qvl.runtime.vision.backend`)."""

    merge_size: int
    token_pixels: int
    layout: Layout

    @property
    def identity(self) -> str:
        """Of what decides the embeddings of given patches; see `qvl.runtime.vision.cache.embedding_key`."""

    def prepare(self, chunk: VisionChunk, progress: Watch | None = None) -> Patches:
        """Read a picture or video and cut it into patches; progress is that of a video's frames."""

    def encode_steps(self, inputs: Sequence[Patches]) -> Generator[float, None, list[VisionEmbedding]]:
        """Embeddings of prepared patches; yields the fraction done where other work can go between."""


class EmbeddingStore(Unpicklable):
    """Finds a source's unit and its embeddings, and encodes those that are missing. Safe for threads.

    Units outlive embeddings, which go, least recently used first, when there are many or large ones: a
    picture that a KV cache still holds is not encoded again. Patches last as long as a unit that needs them.
    """

    def __init__(
        self, backend: VisionBackend | None, max_bytes: int = MAX_BYTES, cache: EmbeddingCache | None = None
    ) -> None:
        """cache: has embeddings of earlier processes, and keeps new ones for later processes."""
        self._backend = backend
        self._max_bytes = max_bytes
        self._cache = cache
        self._lock = threading.Lock()  # of the four below
        self._visions: dict[str, Vision] = {}
        self._sources: WeakValueDictionary[str, _Source] = WeakValueDictionary()
        self._embeddings: OrderedDict[str, NDArray[np.float32]] = OrderedDict()
        self._early: set[str] = set()
        self._thread: threading.Thread | None = None
        self._called_off = threading.Event()

    @property
    def token_pixels(self) -> int:
        """Pixels of a picture that become one token; 0 where every picture has one size."""
        return self._backend.token_pixels if self._backend is not None else 0

    def look_ahead(self, wanted: Callable[[], Iterable[VisionChunk]]) -> None:
        """Begin to encode in a thread; whoever uses the store next waits for its end.

        Args:
            wanted: gives the pictures that the next prompt is likely to have; called in the thread.
        """

        def work() -> None:
            # an unreadable picture raises when the prompt that names it is read
            with suppress(Exception):
                placed = [piece for chunk in wanted() for piece in self._place(chunk, None)]
                steps = self._encode([piece for piece in placed if isinstance(piece, VisionUnit)])
                made = run(steps, lambda _: not self._called_off.is_set()).made
                with self._lock:
                    self._early.update(made)

        self._thread = threading.Thread(target=work, name="qvl-look-ahead", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop encoding ahead."""
        self._called_off.set()
        self._settle()

    def _settle(self) -> None:
        if (thread := self._thread) is not None:
            thread.join()
            self._thread = None

    def place(self, chunk: VisionChunk, progress: Watch | None = None) -> list[str | VisionUnit]:
        """The text and units of a picture or video in a prompt; it is read, but not yet encoded.

        Args:
            progress: of the frames of a video.

        Returns:
            Units, and text in which control tokens are written by name; for `ChatTemplate.units`.

        Raises:
            InputError: there is no image encoder, or the source cannot be read.
            Cancelled: progress returned False.
        """
        self._settle()
        return self._place(chunk, progress)

    def _place(self, chunk: VisionChunk, progress: Watch | None) -> list[str | VisionUnit]:
        backend = self._need_backend()
        key = source_key(chunk)
        with self._lock:
            vision = self._visions.get(key)
            source = self._sources.setdefault(key, _Source(chunk, backend))
        if vision is None:
            patches = backend.prepare(chunk, progress)
            grid = merged(patches.grid_thw, backend.merge_size)
            vision = Vision(chunk.kind, grid, patches.seconds, patches.fps, patches.picture)
            with self._lock:
                self._visions[key] = vision
                for old in list(self._visions)[: max(0, len(self._visions) - _MAX_UNITS)]:
                    del self._visions[old]
                if sum(s.n_bytes for s in self._sources.values()) < self._max_bytes:
                    source.patches = patches
        return placed(backend.layout, vision, key, source)

    def encode(self, units: Iterable[VisionUnit], progress: Watch | None = None) -> Encoded:
        """Embeddings of units; missing ones are made in one run.

        Raises:
            Cancelled: progress returned False.
        """
        return run(self.encode_steps(list(units)), progress)

    def encode_steps(self, units: Sequence[VisionUnit]) -> EncodingSteps:
        """The same in steps."""
        self._settle()
        encoded = yield from self._encode(units)
        with self._lock:
            early = self._early.intersection(unit.key for unit in units)
            self._early -= early
        return Encoded(encoded.vectors, encoded.made | early)

    def _encode(self, units: Sequence[VisionUnit]) -> EncodingSteps:
        found: dict[str, NDArray[np.float32]] = {}
        missing: dict[str, VisionUnit] = {}
        with self._lock:
            for unit in units:
                if unit.key in self._embeddings:
                    self._embeddings.move_to_end(unit.key)
                    found[unit.key] = self._embeddings[unit.key]
                else:
                    missing[unit.key] = unit
        patches = {key: _patches(unit) for key, unit in missing.items()}
        if self._cache is not None:
            self._take_cached(self._cache, patches, found)
        made: list[VisionEmbedding] = []
        if patches:
            made = yield from self._need_backend().encode_steps(list(patches.values()))
        for key, embedding in zip(patches, made, strict=True):
            found[key] = embedding.embeddings
            if self._cache is not None:
                self._cache.put(embedding_key(patches[key], self._need_backend().identity), embedding)
        with self._lock:
            self._embeddings.update((key, found[key]) for key in missing)
            size = sum(e.nbytes for e in self._embeddings.values())
            while len(self._embeddings) > 1 and (
                size > self._max_bytes or len(self._embeddings) > _MAX_EMBEDDINGS
            ):
                size -= self._embeddings.popitem(last=False)[1].nbytes
        return Encoded(found, frozenset(patches))

    def _take_cached(
        self, cache: EmbeddingCache, patches: dict[str, Patches], found: dict[str, NDArray[np.float32]]
    ) -> None:
        """Take the embeddings that the cache has, and drop their patches."""
        for key in list(patches):
            entry = cache.get(embedding_key(patches[key], self._need_backend().identity))
            if entry is not None:
                found[key] = entry.embeddings
                del patches[key]

    def _need_backend(self) -> VisionBackend:
        if self._backend is None:
            raise InputError(
                "this model was opened without an image encoder",
                hint="pass its mmproj file (`mmproj`), or put it into the model's folder",
            )
        return self._backend


class _Source:
    """Gives the patches of a picture or video; its units share it."""

    def __init__(self, chunk: VisionChunk, backend: VisionBackend) -> None:
        self._chunk, self._backend = chunk, backend
        self.patches: Patches | None = None

    @property
    def n_bytes(self) -> int:
        patches = self.patches
        return patches.pixel_values.nbytes if patches is not None else 0

    def __call__(self) -> Patches:
        """Those that were kept, once; later ones are made again."""
        patches, self.patches = self.patches, None
        return patches or self._backend.prepare(self._chunk)


def _patches(unit: VisionUnit) -> Patches:
    assert unit.source is not None, "a unit whose source was let go"
    return unit.source()


def run(steps: EncodingSteps, progress: Watch | None = None) -> Encoded:
    """An encoding from its beginning to its end.

    Raises:
        Cancelled: progress returned False.
    """
    try:
        while True:
            share = next(steps)
            if progress is not None and progress(share) is False:
                raise Cancelled("the encoding was stopped")
    except StopIteration as end:
        encoded: Encoded = end.value
        return encoded
    finally:
        steps.close()


def source_key(chunk: VisionChunk) -> str:
    """Key of a source: path, size and time of a file, which is not read; a hash of data."""
    digest = hashlib.blake2b(f"{chunk.kind} {chunk.options}".encode(), digest_size=16)
    _add(digest, chunk.source)
    return digest.hexdigest()


def _add(digest: Any, source: Any) -> None:
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        digest.update(os.fsencode(path.absolute()))
        if os.path.isdir(path):  # noqa: PTH112 - that of Path raises for a name too long
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
        digest.update(repr(source.info.get("transparency")).encode())
        digest.update(source.tobytes())
    else:
        digest.update(repr(source).encode())


def _add_stat(digest: Any, path: Path) -> None:
    try:
        stat = path.stat()
    except (OSError, ValueError):
        return  # reading it raises the error
    digest.update(os.fsencode(path.name))
    digest.update(f" {stat.st_ino} {stat.st_size} {stat.st_mtime_ns}".encode())
