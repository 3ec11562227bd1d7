"""Pictures and videos as the units of a prompt, by the layout of their family."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial

from qvl.runtime.engine.units import VisionUnit
from qvl.runtime.prompt.positions import Span, VisionSpan
from qvl.runtime.prompt.rules import Layout, Vision
from qvl.runtime.vision.grid import n_patches
from qvl.runtime.vision.preprocess import Patches

Source = Callable[[], Patches]


def placed(layout: Layout, vision: Vision, key: str, source: Source | None = None) -> list[str | VisionUnit]:
    """The text and units that stand in a prompt for a picture or video, one unit for each span.

    A video of several spans is cut between its frame pairs, which the image encoder sees by themselves; each
    part is encoded, and kept, like a picture of its own.

    Args:
        key: of its embeddings; parts have the key with a number.
        source: gives the patches.
    """
    pieces = layout(vision)
    spans = [piece for piece in pieces if not isinstance(piece, str)]
    if len(spans) == 1:
        return [
            piece if isinstance(piece, str) else VisionUnit(key, piece, source, vision.picture)
            for piece in pieces
        ]
    parts = None if source is None else _Parts(source, spans)
    found: list[str | VisionUnit] = []
    i = 0
    for piece in pieces:
        if isinstance(piece, str):
            found.append(piece)
            continue
        found.append(VisionUnit(f"{key}/{i}", piece, None if parts is None else partial(parts.take, i)))
        i += 1
    return found


class _Parts:
    """Cuts the patches of a video, which are read once for all of them."""

    def __init__(self, source: Source, spans: Sequence[Span]) -> None:
        self._source = source
        self._pairs = [span.t if isinstance(span, VisionSpan) else 1 for span in spans]
        self._left: set[int] = set()
        self._whole: Patches | None = None
        self._lock = threading.Lock()

    def take(self, i: int) -> Patches:
        """The patches of the i-th span."""
        with self._lock:
            if self._whole is None:
                self._whole, self._left = self._source(), set(range(len(self._pairs)))
            whole = self._whole
            self._left.discard(i)
            if not self._left:
                self._whole = None
        _, h, w = whole.grid_thw
        first, rows = sum(self._pairs[:i]), n_patches((1, h, w))
        values = whole.pixel_values[first * rows : (first + self._pairs[i]) * rows]
        return Patches(values, (self._pairs[i], h, w))
