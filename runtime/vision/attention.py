"""Attention within segments: fused (flash attention), or in tiles of matrix products.

Each takes q, k, v as [head_dim, n_head, n] and runs of equal segments, and gives
[n_embd, n], softmax(scale · q kᵀ) v: patches of one segment see each other and nothing else. Where there is
another number of queries than of keys (cross-attention), there is one segment, and queries see all of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from qvl.runtime.ggml import library as ggml
from qvl.runtime.ggml.graph import Tensor
from qvl.runtime.vision.grid import Runs


class Attention(Protocol):
    """Interface of an attention."""

    def n_nodes(self, runs: Runs) -> int:
        """A bound on the nodes it makes."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, runs: Runs, scale: float) -> Tensor: ...


@dataclass(frozen=True)
class FlashAttention:
    """`ggml_flash_attn_ext`: scores are never stored.

    Attributes:
        kv_type: the type k and v are handed over in; F32 is exact on the CPU, F16 suits GPUs.
    """

    kv_type: ggml.Type = ggml.Type.F32

    def n_nodes(self, runs: Runs) -> int:
        return 16 * len(runs)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, runs: Runs, scale: float) -> Tensor:
        def run(start: int, count: int, size: int) -> Tensor:
            queries = _queries(q, k, size)
            qs = _window(q, start, count, queries).permute(0, 2, 1, 3)
            ks, vs = (_window(x, start, count, size).permute(0, 2, 1, 3) for x in (k, v))
            out = qs.flash_attention(ks.cast(self.kv_type), vs.cast(self.kv_type), scale)
            return out.reshape(q.shape[0] * q.shape[1], count * queries)

        return joined([run(start, count, size) for start, count, size in _spans(runs)])


@dataclass(frozen=True)
class TiledAttention:
    """Matrix products and a softmax over tiles of queries, so that memory stays linear in patches.

    Attributes:
        kv_type: the type of k and of v for the products.
        tile_bytes: scores held at a time.
        multiple: the head is padded with zeros to a multiple of this.
    """

    kv_type: ggml.Type = ggml.Type.F32
    tile_bytes: int = 64 << 20
    multiple: int = 1

    def _tile(self, n_head: int, count: int, size: int) -> int:
        rows = self.tile_bytes // (4 * size * n_head * count)
        return max(1, min(size, rows // 32 * 32 or rows))

    def n_nodes(self, runs: Runs) -> int:
        # the number of heads is not known here: 64 bounds every published tower
        return sum(24 + 8 * (math.ceil(size / self._tile(64, count, size)) + 1) for count, size in runs)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, runs: Runs, scale: float) -> Tensor:
        head_dim, n_head = q.shape[:2]
        pad = -head_dim % self.multiple

        def run(start: int, count: int, size: int) -> Tensor:
            queries = _queries(q, k, size)
            qs = _window(q, start, count, queries).permute(0, 2, 1, 3)  # [head_dim, queries, n_head, count]
            ks, vs = (_window(x, start, count, size) for x in (k, v))
            ks = ks.pad(pad).permute(0, 2, 1, 3).cont().cast(self.kv_type)
            vs = vs.permute(1, 2, 0, 3).cont().cast(self.kv_type)  # [size, head_dim, n_head, count]
            tile = self._tile(n_head, count, size)
            tiles = []
            for first in range(0, queries, tile):
                rows = min(tile, queries - first)
                part = qs.view((head_dim, rows, n_head, count), qs.strides[1:], first * qs.strides[1])
                scores = (ks @ part.cont().pad(pad)).softmax(scale)
                tiles.append((vs @ scores).permute(0, 2, 1, 3).cont())  # [head_dim, n_head, rows, count]
            return joined(tiles, axis=2).reshape(head_dim * n_head, count * queries)

        return joined([run(start, count, size) for start, count, size in _spans(runs)])


def _spans(runs: Runs) -> list[tuple[int, int, int]]:
    """(first patch, number of segments, patches in each) of every run."""
    spans, start = [], 0
    for count, size in runs:
        spans.append((start, count, size))
        start += count * size
    return spans


def _queries(q: Tensor, k: Tensor, size: int) -> int:
    """Queries of a segment of so many keys."""
    return size if q.shape[2] == k.shape[2] else q.shape[2]


def _window(x: Tensor, start: int, count: int, size: int) -> Tensor:
    """count segments of size patches from start: [head_dim, n_head, size, count]."""
    _, head, patch, _ = x.strides
    return x.view((*x.shape[:2], size, count), (head, patch, patch * size), start * patch)


def joined(parts: list[Tensor], axis: int = 1) -> Tensor:
    """Concatenation in pairs, so that each value is copied log(n) times at most."""
    while len(parts) > 1:
        pairs = [parts[i : i + 2] for i in range(0, len(parts), 2)]
        parts = [p[0].concat(p[1], axis) if len(p) == 2 else p[0] for p in pairs]
    return parts[0]
