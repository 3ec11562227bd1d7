"""Reading ahead: while the model works, threads hash, decode and resize the pictures that come next."""

from __future__ import annotations

import ctypes
import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qvl.runtime.caption.activity import Activity
from qvl.runtime.caption.inputs import Item
from qvl.runtime.caption.prompts import Prompt, Prompts
from qvl.runtime.errors import ImageError, QvlError
from qvl.runtime.files import open_file
from qvl.runtime.vision.image import with_picture
from qvl.runtime.vision.preprocess import Preprocessor
from qvl.runtime.vision.video import VideoFrames, load_video

_CHUNK: Final = 1 << 20
_M_MMAP_THRESHOLD: Final = -3  # malloc.h
_LARGE: Final = 1 << 15
_MOST_AHEAD: Final = 256 << 20  # bytes of frames that wait; a video may have 150 MB


@dataclass(frozen=True)
class PreparedPicture:
    """A picture or video ready for the encoder.

    Attributes:
        sha256: of the file's content.
        frames: uint8 [n, h, w, 3], resized; one for a picture.
        size: (width, height) of the picture, upright, before it was resized.
        seconds: spent on it, in its thread.
        times, fps: of a video: the time of each frame, and how many were taken of each second.
    """

    item: Item
    sha256: str
    frames: NDArray[np.uint8]
    size: tuple[int, int]
    prompt: Prompt
    seconds: float
    times: tuple[float, ...] = ()
    fps: float = 2.0


@dataclass(frozen=True)
class Rejected:
    """A picture that cannot be captioned, and why.

    Attributes:
        sha256: of its content, if that could be read.
    """

    item: Item
    reason: str
    sha256: str | None = None


@dataclass(frozen=True)
class Preparer:
    """Turns items into frames and prompts; any thread may call it.

    Attributes:
        activity: told how far the frames of videos are read; closed, it stops the reading.
    """

    preprocessor: Preprocessor
    prompts: Prompts
    activity: Activity = field(default_factory=Activity)

    def __call__(self, item: Item) -> PreparedPicture | Rejected:
        """Never raises for a picture's own faults: whatever is wrong with one must not stop the others."""
        started, sha256 = time.perf_counter(), None
        try:
            sha256 = content_hash(item.path)
            seen = self._frames(item)
            size = (seen.source_size[1], seen.source_size[0])
            prompt = self.prompts.of(item.path, *size)
        except QvlError as e:
            return Rejected(item, f"{e.message} ({e.hint})" if e.hint else e.message, sha256)
        except Exception as e:  # a decoder's bug, memory, anything: it is this picture's own
            return Rejected(item, f"{item.path}: {type(e).__name__}: {e}", sha256)
        took = time.perf_counter() - started
        return PreparedPicture(item, sha256, seen.frames, size, prompt, took, seen.seconds, seen.fps)

    def _frames(self, item: Item) -> VideoFrames:
        if item.kind == "video":
            return self._video(item.path)
        return with_picture(item.path, self._still)

    def _still(self, picture: Image.Image) -> VideoFrames:
        size = (picture.height, picture.width)
        return VideoFrames(self.preprocessor.resize(picture)[None], (0,), (), size)

    def _video(self, path: str) -> VideoFrames:
        what = f"reading the frames of {Path(path).name}"
        try:
            return load_video(path, self.preprocessor, progress=lambda share: self.activity.at(what, share))
        finally:
            self.activity.over(what)


def content_hash(path: str) -> str:
    """SHA-256 of a file.

    Raises:
        ImageError: it cannot be read, or is no file.
    """
    digest = hashlib.sha256()
    try:
        with open_file(path) as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except FileNotFoundError as e:
        raise ImageError(f"{path}: no such file") from e
    except IsADirectoryError as e:
        raise ImageError(f"{path}: a folder, not a picture") from e
    except (OSError, ValueError) as e:
        raise ImageError(f"{path}: cannot be read: {getattr(e, 'strerror', None) or e}") from e
    return digest.hexdigest()


def return_large_blocks() -> None:
    """Let glibc give every large block back to the system when it is freed, for the rest of the process.

    By default it raises the size from which it does so as it meets larger blocks. Pictures of mixed sizes,
    decoded in several threads and kept for a while, then leave holes in the heap of every thread, and the
    resident set creeps up: by a fifth over 2,000 pictures with the embedded model, where it is flat so.
    """
    with suppress(OSError, AttributeError, TypeError):  # not glibc
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)


class Prefetcher:
    """Prepares items in order, a bounded number of items and of bytes ahead of their use.

    Args:
        threads: that prepare.
        ahead: items begun and not yet taken.
        most_bytes: of frames of items not yet taken; one that is being prepared counts as the largest so
            far. One item is always prepared.
    """

    def __init__(
        self,
        items: Iterable[Item],
        prepare: Callable[[Item], PreparedPicture | Rejected],
        threads: int,
        ahead: int,
        most_bytes: int = _MOST_AHEAD,
    ) -> None:
        self._items: Iterator[Item] = iter(items)
        self._prepare = prepare
        self._ahead = ahead
        self._most_bytes = most_bytes
        self._largest = 0
        self._pool = ThreadPoolExecutor(threads, "qvl-prepare")
        self._futures: deque[Future[PreparedPicture | Rejected]] = deque()
        self._lock = threading.Lock()
        self._fill()

    def _fill(self) -> None:
        with self._lock:
            while self._has_room() and (item := next(self._items, None)) is not None:
                self._futures.append(self._pool.submit(self._prepare, item))

    def _has_room(self) -> bool:
        ready = [_n_bytes(future) for future in self._futures if future.done()]
        self._largest = max(self._largest, *ready, 0)
        running = len(self._futures) - len(ready)
        expected = sum(ready) + (running + 1) * self._largest
        return not self._futures or (len(self._futures) < self._ahead and expected <= self._most_bytes)

    @property
    def exhausted(self) -> bool:
        """True once everything has been taken."""
        return not self._futures

    def take(self, timeout: float | None) -> PreparedPicture | Rejected | None:
        """The next item; None if it is not ready within so many seconds (None waits), or at the end."""
        if not self._futures:
            return None
        try:
            found = self._futures[0].result(timeout)
        except TimeoutError:
            return None
        self._largest = max(self._largest, _n_bytes(self._futures.popleft()))
        self._fill()
        return found

    def close(self) -> None:
        """Stop; what is being prepared is finished and dropped."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._futures.clear()


def _n_bytes(future: Future[PreparedPicture | Rejected]) -> int:
    if future.cancelled() or future.exception() is not None:
        return 0
    found = future.result()
    return found.frames.nbytes if isinstance(found, PreparedPicture) else 0
