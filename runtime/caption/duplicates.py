"""Pictures of equal content, found before any is captioned, for workers that know nothing of each other.

Only files that share their size with another are read, so a dataset without copies costs a `stat` each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final

from qvl.runtime.caption.inputs import Item
from qvl.runtime.caption.prompts import Prompts
from qvl.runtime.errors import QvlError

_THREADS: Final = 8  # they mostly wait for a network's file system


def first_duplicates(
    items: Sequence[Item], prompts: Prompts, content_of: Callable[[Item], str | None]
) -> list[int]:
    """For each item the place of the first with its content and its prompt; mostly its own.

    Args:
        content_of: the SHA-256 of an item's content, or None if it is not to be known; called in threads.
    """
    sizes = [_size(item.path) for item in items]
    n_of_size = Counter(sizes)
    shared = [i for i, size in enumerate(sizes) if size is not None and n_of_size[size] > 1]
    found = list(range(len(items)))
    seen: dict[tuple[str, str], int] = {}

    def key(i: int) -> tuple[str, str] | None:
        try:
            content = content_of(items[i])
            # Equal pictures are of equal width and height, so these need not be known here.
            return None if content is None else (content, prompts.of(items[i].path, 0, 0).text)
        except QvlError:
            return None  # what is wrong with it is found where it is captioned

    with ThreadPoolExecutor(_THREADS, "qvl-duplicates") as pool:
        for i, same in zip(shared, pool.map(key, shared), strict=True):
            if same is not None:
                found[i] = seen.setdefault(same, i)
    return found


def _size(path: str) -> int | None:
    with suppress(OSError, ValueError):
        return Path(path).stat().st_size
    return None
