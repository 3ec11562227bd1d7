"""The sequence that a KV cache holds: text tokens and whole vision spans, in order.

A text token is its id, a vision span one `VisionUnit`, however many cells it takes. So a prefix of units
is always something that the cache can be cut back to, and comparing two prompts is comparing two lists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qvl.runtime.vision.preprocess import Patches
from qvl.runtime.vision.size import PictureInfo


class UnitSpan(Protocol):
    """The place of a picture or video in the positions of a prompt (`qvl.runtime.prompt.positions`)."""

    @property
    def t(self) -> int:
        """Frames, or pairs of them; 1 for a picture."""

    @property
    def n_tokens(self) -> int:
        """KV cells that it takes."""

    @property
    def advance(self) -> int:
        """Advance of the position over it."""

    def positions(self, start: int) -> NDArray[np.int32]:
        """int32 [rows, n_tokens], when it begins at position `start`."""


@dataclass(frozen=True)
class VisionUnit:
    """A picture or video in the sequence.

    Attributes:
        key: of its embeddings; two units with one key are the same picture.
        span: its cells and positions.
        source: gives its patches, as long as its embeddings may still have to be made.
        picture: sizes and name; None for videos, and where they are not known.
    """

    key: str
    span: UnitSpan
    source: Callable[[], Patches] | None = field(default=None, compare=False, repr=False)
    picture: PictureInfo | None = field(default=None, compare=False, repr=False)


Unit: TypeAlias = int | VisionUnit


def bare(unit: Unit) -> Unit:
    """The unit without its source, so that the picture can be freed."""
    return unit if isinstance(unit, int) or unit.source is None else replace(unit, source=None)


def n_cells(units: Iterable[Unit]) -> int:
    """KV cells that the units take."""
    return sum(1 if isinstance(unit, int) else unit.span.n_tokens for unit in units)


def n_positions(units: Iterable[Unit]) -> int:
    """Advance of the position over the units."""
    return sum(1 if isinstance(unit, int) else unit.span.advance for unit in units)


def n_vision_cells(units: Iterable[Unit]) -> int:
    """KV cells that pictures and videos take."""
    return sum(unit.span.n_tokens for unit in units if isinstance(unit, VisionUnit))


def common_prefix(a: Sequence[Unit], b: Sequence[Unit]) -> int:
    """Length, in units, of the longest common prefix."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
