"""M-RoPE positions of a prompt made of text and vision spans (Qwen2-VL paper, arXiv 2409.12191, section 2.1).

Every token has three positions: time, height and width. Text tokens have the same value in all three
and advance by one. The tokens of a vision span lie on a grid of t frames, h rows and w columns: each
takes its grid coordinates, counted from the position where the span begins. What follows the span
begins at the largest position so far plus one, that is max(t, h, w) after the span's beginning,
however many tokens the span has. So KV cells and positions are two different counts.

Worked example, three text tokens, a picture of 1 x 2 x 3 merged patches, two text tokens:

    cell    0  1  2    3  4  5  6  7  8    9 10
    token   a  b  c    ┌─ picture ────┐    d  e
    t       0  1  2    3  3  3  3  3  3    6  7
    h       0  1  2    3  3  3  4  4  4    6  7
    w       0  1  2    3  4  5  3  4  5    6  7

Six cells, but three positions: max(1, 2, 3).

This is transformers 4.57's `get_rope_index` of Qwen2-VL and, with a time step, of Qwen2.5-VL. transformers 5
leaves t out of the maximum, which gives tokens after a long video the positions of its last frames; the paper
and the training code have it as here. Qwen3-VL's videos are a span of one frame pair after the other, with
timestamps as text between them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qvl.runtime.errors import InputError

_MAX_STEP: Final = 1 << 16


@dataclass(frozen=True)
class TextSpan:
    """n text tokens."""

    n: int

    def __post_init__(self) -> None:
        if self.n < 0:
            raise InputError(f"TextSpan: n is {self.n}, expected 0 or more")

    @property
    def t(self) -> int:
        """Frame pairs: the tokens are those of one moment."""
        return 1

    @property
    def n_tokens(self) -> int:
        """KV cells the span takes."""
        return self.n

    @property
    def advance(self) -> int:
        """Advance of the position over the span."""
        return self.n

    def positions(self, start: int) -> NDArray[np.int32]:
        """One position a token, when the span begins at `start`: int32 [n_tokens]."""
        return np.arange(start, start + self.n, dtype=np.int32)


@dataclass(frozen=True)
class FlatSpan(TextSpan):
    """A picture whose n tokens have one position each, as text has (Qwen-VL)."""


@dataclass(frozen=True)
class VisionSpan:
    """A picture (t = 1) or a video, on the merged grid: t frame pairs, h rows, w columns of tokens.

    Attributes:
        time_step: positions from one frame pair to the next; times of pairs are cut to whole positions.
            Qwen2.5-VL has two a second, the others one a pair.
    """

    t: int
    h: int
    w: int
    time_step: float = 1.0

    def __post_init__(self) -> None:
        if min(self.t, self.h, self.w) < 1:
            raise InputError(f"VisionSpan: t, h, w are {self.t}, {self.h}, {self.w}, expected 1 or more each")
        if not 0 < self.time_step <= _MAX_STEP:
            raise InputError(f"VisionSpan: time_step is {self.time_step}, expected above 0 to {_MAX_STEP}")

    @property
    def times(self) -> NDArray[np.int32]:
        """Time of each frame pair, counted from the span's beginning: int32 [t].

        In single precision, as torch multiplies whole numbers by a float (qwen-vl-finetune, rope2d.py,
        `get_rope_index_25`).
        """
        return (np.arange(self.t, dtype=np.float32) * np.float32(self.time_step)).astype(np.int32)

    @property
    def n_tokens(self) -> int:
        """KV cells the span takes."""
        return self.t * self.h * self.w

    @property
    def advance(self) -> int:
        """Advance of the position over the span."""
        return max(int(self.times[-1]) + 1, self.h, self.w)

    def positions(self, start: int) -> NDArray[np.int32]:
        """Time, height and width of each token, when the span begins at `start`: int32 [3, n_tokens]."""
        grid = np.indices((self.t, self.h, self.w), dtype=np.int32)
        grid[0] = self.times[:, None, None]
        return grid.reshape(3, -1) + np.int32(start)


Span: TypeAlias = TextSpan | VisionSpan


def mrope_positions(spans: Iterable[Span], start: int = 0) -> tuple[NDArray[np.int32], int]:
    """Positions of every token of the spans, in order.

    Args:
        start: position of the first token.

    Returns:
        int32 [3, n_tokens], rows time, height, width; and the position of the token that would follow.

    >>> positions, following = mrope_positions([TextSpan(1), VisionSpan(t=1, h=2, w=2), TextSpan(1)])
    >>> positions.tolist()
    [[0, 1, 1, 1, 1, 3], [0, 1, 1, 2, 2, 3], [0, 1, 2, 1, 2, 3]]
    >>> following
    4
    """
    parts: list[NDArray[np.int32]] = [np.empty((3, 0), np.int32)]
    position = start
    for span in spans:
        parts.append(np.broadcast_to(span.positions(position), (3, span.n_tokens)))
        position += span.advance
    return np.concatenate(parts, axis=1), position
