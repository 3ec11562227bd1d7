"""Rows to write: for each tensor of a GGUF file, its source in the checkpoint and the view that gives its
rows.

A family lists these as data. A view cuts, transposes or splits the source without copying it; arithmetic on
the numbers is a function of each float32 chunk, so that tensors of any size pass through little memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
View: TypeAlias = Callable[[Array], Array]
"""From the source as an array of `source_shape` to one that shares its memory and whose rows, in order, are
those of `shape`; leading axes may be more than there."""
Values: TypeAlias = Callable[[npt.NDArray[np.float32], int], npt.NDArray[np.float32]]
"""From float32 rows [n, n_per_row] and the number of the first one to what is quantized, of the same
shape."""


def whole(source: Array) -> Array:
    """The source as it is."""
    return source


def rows(start: int, count: int) -> View:
    """Rows from `start` on, of a matrix or a vector."""
    return lambda source: source[start : start + count]


def transposed(source: Array) -> Array:
    """The source with its last two axes exchanged."""
    return source.swapaxes(-1, -2)


@dataclass(frozen=True)
class Mapped:
    """A tensor to write.

    Attributes:
        name: in the GGUF file.
        shape: in the GGUF file, rows first.
        source: the canonical name in the checkpoint.
        view: from the source to an array of `shape`, sharing its memory.
        values: arithmetic on float32 rows, or None.
        source_shape: what the checkpoint's tensor must have; `shape` by default.
        also: another shape that tools save the source in, with its view; it is looked for first.
        keep: written as F32 whatever the type asked for: it is added, not multiplied, or routes experts.
    """

    name: str
    shape: tuple[int, ...]
    source: str
    view: View = whole
    values: Values | None = None
    source_shape: tuple[int, ...] = ()
    also: tuple[tuple[int, ...], View] | None = None
    keep: bool = False

    def __post_init__(self) -> None:
        if not self.source_shape:
            object.__setattr__(self, "source_shape", self.shape)

    def of(self, shape: tuple[int, ...]) -> Mapped:
        """The row for a source of this shape."""
        if self.also is None or self.also[0] != shape:
            return self
        return replace(self, source_shape=shape, view=self.also[1], also=None)

    @property
    def n_per_row(self) -> int:
        return self.shape[-1]

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)


def chunks(view: Array, size: int, *, apart: bool = False) -> Iterator[tuple[int, Array]]:
    """Cut an array into parts of whole rows with about `size` elements, without copying.

    Args:
        apart: parts never hold rows of two matrices (an importance matrix differs from expert to expert).

    Yields:
        The number of the part's first row, counted over all leading axes, and the part.
    """
    if view.ndim == 1:
        view = view.reshape(1, -1)
    rows_each = math.prod(view.shape[1:-1])
    if view.ndim > 2 and (apart or view[0].size > size):
        for i, inner in enumerate(view):
            for row, part in chunks(inner, size, apart=apart):
                yield i * rows_each + row, part
        return
    step = max(1, size // view[0].size)
    for i in range(0, len(view), step):
        yield i * rows_each, view[i : i + step]
