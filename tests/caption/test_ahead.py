"""Preparation ahead of use is bounded in number and in bytes."""

from __future__ import annotations

import numpy as np
import pytest

from qvl.runtime.caption.inputs import Item
from qvl.runtime.caption.prepare import Prefetcher, PreparedPicture, Rejected


def prepared(item: Item, n_bytes: int) -> PreparedPicture:
    frames = np.zeros((1, 1, n_bytes, 1), np.uint8)
    return PreparedPicture(item, "", frames, (1, 1), None, 0.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("most_bytes", [1, 250, 1000, 1 << 30])
def test_bytes_ahead_are_bounded(most_bytes: int) -> None:
    sizes = [100, 300, 5, 5, 5, 200, 0, 40, 40, 500, 1, 1]
    begun: list[str] = []

    def prepare(item: Item) -> PreparedPicture | Rejected:
        begun.append(item.path)
        size = sizes[int(item.path)]
        return prepared(item, size) if size else Rejected(item, "damaged")

    items = [Item(str(i)) for i in range(len(sizes))]
    ahead = Prefetcher(items, prepare, threads=1, ahead=4, most_bytes=most_bytes)
    taken = []
    while not ahead.exhausted:
        for future in ahead._futures:
            future.exception()  # wait for it
        waiting = [sizes[int(path)] for path in begun[len(taken) :]]
        assert len(waiting) <= 4
        # before anything has been prepared, nothing is known of the sizes
        assert len(taken) == 0 or len(waiting) <= 1 or sum(waiting) <= most_bytes + max(waiting)
        found = ahead.take(None)
        assert found is not None
        taken.append(found.item.path)
    ahead.close()
    assert taken == [item.path for item in items]
