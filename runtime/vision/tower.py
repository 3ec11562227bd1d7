"""Types shared by the vision towers of all families: grids, attention segments, a built graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qvl.runtime.ggml.graph import Graph, Tensor

Grid = tuple[int, int, int]  # temporal patches, rows of patches, columns of patches


def segments(grids: Sequence[Grid]) -> list[tuple[int, int]]:
    """Runs of (number of segments, patches in each) with neighbours of one size joined."""
    runs: list[tuple[int, int]] = []
    for t, h, w in grids:
        if runs and runs[-1][1] == h * w:
            runs[-1] = (runs[-1][0] + t, h * w)
        else:
            runs.append((t, h * w))
    return runs


@dataclass(frozen=True)
class Encoding:
    """A graph with its ends.

    Attributes:
        pixels: input, float32 [n_patch_in, n_patches].
        positions: input, int32 [4 n_patches].
        output: float32 [n_out, n_patches / 4].
    """

    graph: Graph
    pixels: Tensor
    positions: Tensor
    output: Tensor
