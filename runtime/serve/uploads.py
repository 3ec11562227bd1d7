"""Uploaded videos as temporary files named by their content, so that a repeated video is one source."""

from __future__ import annotations

import hashlib
import tempfile
import threading
from collections import Counter, OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Final

MAX_BYTES: Final = 1 << 30


class Uploads:
    """A temporary folder of uploads; beyond `max_bytes` the oldest that no request uses are deleted."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="qvl-serve-", ignore_cleanup_errors=True)
        self._max_bytes = max_bytes
        self._sizes: OrderedDict[Path, int] = OrderedDict()
        self._used: Counter[Path] = Counter()
        self._lock = threading.Lock()

    def take(self, data: bytes) -> Path:
        """Store bytes, or find the same ones stored; call `release` on the file once."""
        path = Path(self._folder.name) / hashlib.sha256(data).hexdigest()
        with self._lock:
            if path not in self._sizes:
                path.write_bytes(data)
                self._sizes[path] = len(data)
            self._sizes.move_to_end(path)
            self._used[path] += 1
        return path

    def release(self, path: Path) -> None:
        """Note that a request has done with a file."""
        with self._lock:
            self._used[path] -= 1
            for old in [old for old in self._sizes if self._used[old] <= 0]:
                if sum(self._sizes.values()) <= self._max_bytes:
                    break
                del self._sizes[old], self._used[old]
                with suppress(OSError):
                    old.unlink()

    def close(self) -> None:
        """Remove them all."""
        self._folder.cleanup()
