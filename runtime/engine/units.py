"""The sequence that a KV cache holds: text tokens and whole vision spans, in order.

A text token is its id, a vision span one `VisionUnit`, however many cells it takes. So a prefix of units
is always something that the cache can be cut back to, and comparing two prompts is comparing two lists.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from qvl.runtime.prompt.positions import VisionSpan


@dataclass(frozen=True)
class VisionUnit:
    """A picture or video in the sequence.

    Attributes:
        key: what its embeddings are found by; two units with one key are the same picture.
        span: its place on the merged grid.
    """

    key: str
    span: VisionSpan


Unit: TypeAlias = int | VisionUnit


def n_cells(units: Iterable[Unit]) -> int:
    """KV cells that the units take."""
    return sum(1 if isinstance(unit, int) else unit.span.n_tokens for unit in units)


def n_positions(units: Iterable[Unit]) -> int:
    """How far the position moves over the units."""
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
