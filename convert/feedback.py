"""GPTQ within K-quant blocks: later weights compensate each rounding error, by the inputs' covariance.

The squared error of a row's output is e'Ce, where C holds the products of inputs. A K-quant's search, with an
importance matrix or without, uses only the diagonal of C. Here its scales are kept and the levels are chosen
again, column by column: after each, the columns to come are moved to minimize e'Ce (Frantar et al. 2022,
"GPTQ", section 3.3). C is known within blocks of 256 columns, and errors are compensated within these.

The code is numpy, so that bytes do not depend on a compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qvl.runtime.errors import GGUFError
from qvl.runtime.ggml.library import Type

_BLOCK: Final = 256
_STEP: Final = 32  # columns that are moved one by one, the rest by a matrix product
# Added to each input's mean square, as a share of the block's mean: a few pictures do not show all directions
# in which inputs vary, and errors in the others must have a cost too.
_DAMPING: Final = 0.1

Factors: TypeAlias = NDArray[np.float32]
"""float32 [n_blocks, 256, 256]: right of the diagonal, how an error of 1 in row's column moves the others."""


@dataclass(frozen=True)
class _Layout:
    """Layout of a type's block of 256 (ggml-common.h).

    Attributes:
        low, high: levels.
        steps: from packed blocks, uint8 [n, bytes], to scales and offsets, float32 [n, groups] each; a weight
            is scale * level - offset.
        pack: from levels, counted from `low`, uint8 [n, 256], into packed blocks.
    """

    low: int
    high: int
    steps: Callable[[NDArray[np.uint8]], tuple[NDArray[np.float32], NDArray[np.float32]]]
    pack: Callable[[NDArray[np.uint8], NDArray[np.uint8]], None]


def factors(products: NDArray[np.float32], name: str) -> Factors:
    """Factors for `feed_back`, from sums of products of inputs [n_blocks, 256, 256].

    Raises:
        GGUFError: the products are not a covariance matrix.
    """
    out = np.empty(products.shape, np.float32)
    for i, block in enumerate(products):
        c = block.astype(np.float64)
        diagonal = np.einsum("ii->i", c)
        mean = diagonal.mean()
        diagonal += _DAMPING * mean if mean > 0 else 1.0
        try:
            upper = np.linalg.cholesky(np.linalg.inv(c)).T
        except np.linalg.LinAlgError:
            upper = np.full_like(c, np.nan)
        out[i] = upper / np.diag(upper)[:, None]
    if not np.isfinite(out).all():
        raise GGUFError(
            f"the importance matrix's products for {name} are not positive definite",
            hint="the file is damaged: make it again with qvl imatrix",
        )
    return out


def feed_back(kind: Type, values: NDArray[np.float32], data: memoryview, moves: Factors) -> None:
    """Choose the levels of quantized rows again, in place.

    Args:
        kind: a key of `FEEDBACK`.
        values: [n_rows, n_per_row], what was quantized.
        data: the rows as quantized.
        moves: of the columns' blocks, from `factors`.
    """
    with np.errstate(all="ignore"):  # scales beyond F16 are infinite, of which the caller warns
        _feed_back(FEEDBACK[kind], values, data, moves)


def _feed_back(layout: _Layout, values: NDArray[np.float32], data: memoryview, moves: Factors) -> None:
    n_rows, n_blocks = len(values), len(moves)
    packed = np.frombuffer(data, np.uint8).reshape(n_rows * n_blocks, -1)
    scales, offsets = (_by_group(s, n_rows, n_blocks) for s in layout.steps(packed))
    inverse = np.divide(1.0, scales, out=np.zeros_like(scales), where=scales != 0)
    size = _BLOCK // scales.shape[1]
    x = np.ascontiguousarray(values.reshape(n_rows, n_blocks, _BLOCK).transpose(1, 2, 0))
    levels = np.empty(x.shape, np.uint8)
    for start in range(0, _BLOCK, _STEP):
        end = start + _STEP
        errors = np.empty((n_blocks, _STEP, n_rows), np.float32)
        for i in range(start, end):
            column, group = x[:, i], i // size
            level = np.rint((column + offsets[:, group]) * inverse[:, group]).clip(layout.low, layout.high)
            error = column - (level * scales[:, group] - offsets[:, group])
            x[:, i + 1 : end] -= moves[:, i, i + 1 : end, None] * error[:, None]
            levels[:, i], errors[:, i - start] = level - layout.low, error
        x[:, end:] -= moves[:, start:end, end:].transpose(0, 2, 1) @ errors
    layout.pack(levels.transpose(2, 0, 1).reshape(-1, _BLOCK), packed)


def _by_group(steps: NDArray[np.float32], n_rows: int, n_blocks: int) -> NDArray[np.float32]:
    return np.ascontiguousarray(steps.reshape(n_rows, n_blocks, -1).transpose(1, 2, 0))


def _half(packed: NDArray[np.uint8], at: int) -> NDArray[np.float32]:
    """float32 [n, 1]"""
    held: NDArray[Any] = np.ascontiguousarray(packed[:, at : at + 2]).view(np.float16)
    return held.astype(np.float32)


def _affine_steps(packed: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scales and offsets of Q4_K and Q5_K: two halves, then six bits each (`get_scale_min_k4`)."""
    a, b, c = packed[:, 4:8], packed[:, 8:12], packed[:, 12:16]
    scales = np.concatenate([a & 63, c & 15 | a >> 6 << 4], axis=1)
    offsets = np.concatenate([b & 63, c >> 4 | b >> 6 << 4], axis=1)
    return _half(packed, 0) * scales, _half(packed, 2) * offsets


def _symmetric_steps(packed: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scales of Q6_K: eight bits each, and one half."""
    scales = _half(packed, 208) * packed[:, 192:208].view(np.int8)
    return scales, np.zeros_like(scales)


def _pack_q4(levels: NDArray[np.uint8], packed: NDArray[np.uint8]) -> None:
    pairs = levels.reshape(-1, 4, 2, 32)
    packed[:, 16:] = (pairs[:, :, 0] & 15 | pairs[:, :, 1] << 4).reshape(-1, 128)


def _pack_q5(levels: NDArray[np.uint8], packed: NDArray[np.uint8]) -> None:
    pairs = levels.reshape(-1, 4, 2, 32)
    packed[:, 48:] = (pairs[:, :, 0] & 15 | (pairs[:, :, 1] & 15) << 4).reshape(-1, 128)
    packed[:, 16:48] = np.packbits(levels.reshape(-1, 8, 32) >> 4, axis=1, bitorder="little")[:, 0]


def _pack_q6(levels: NDArray[np.uint8], packed: NDArray[np.uint8]) -> None:
    four = levels.reshape(-1, 2, 4, 32)
    packed[:, :128] = (four[:, :, :2] & 15 | (four[:, :, 2:] & 15) << 4).reshape(-1, 128)
    high = four >> 4
    packed[:, 128:192] = (
        high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    ).reshape(-1, 64)


FEEDBACK: Final[Mapping[Type, _Layout]] = {
    Type.Q4_K: _Layout(0, 15, _affine_steps, _pack_q4),
    Type.Q5_K: _Layout(0, 31, _affine_steps, _pack_q5),
    Type.Q6_K: _Layout(-32, 31, _symmetric_steps, _pack_q6),
}
"""Supported types."""
