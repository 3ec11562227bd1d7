"""Grids of patches and of tokens, and the segments within which patches attend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

Grid = tuple[int, int, int]  # temporal patches, rows of patches, columns of patches
Runs = Sequence[tuple[int, int]]  # (number of segments, patches in each)


# Qwen2-VL: patches of 14x14 pixels, of which 2x2 are merged into a token
PATCH_SIZE: Final = 14
MERGE_SIZE: Final = 2
TOKEN_PIXELS: Final = (PATCH_SIZE * MERGE_SIZE) ** 2


def n_patches(grid: Grid) -> int:
    """Patches of a grid."""
    return grid[0] * grid[1] * grid[2]


def merged(grid: Grid, merge_size: int) -> Grid:
    """The grid of tokens that a grid of patches becomes, `merge_size`² patches to a token."""
    t, h, w = grid
    return t, h // merge_size, w // merge_size


def segments(grids: Sequence[Grid]) -> list[tuple[int, int]]:
    """Runs of (number of segments, patches in each) with neighbours of one size joined.

    A segment is one temporal patch of a picture or video: attention never crosses its border.
    """
    runs: list[tuple[int, int]] = []
    for t, h, w in grids:
        if runs and runs[-1][1] == h * w:
            runs[-1] = (runs[-1][0] + t, h * w)
        else:
            runs.append((t, h * w))
    return runs
