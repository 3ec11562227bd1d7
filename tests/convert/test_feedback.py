"""Errors that are fed back: against the formula written out, and by what comes out of a matrix."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize
from numpy.typing import NDArray

from qvl.convert.feedback import FEEDBACK, factors, feed_back
from qvl.convert.native import by_libggml
from qvl.runtime.errors import GGUFError
from qvl.runtime.ggml.library import Type

N_ROWS, N_IN = 48, 512
KINDS = sorted(FEEDBACK)


def inputs(seed: int, n: int = 4000) -> NDArray[np.float32]:
    """Inputs that go together, as activations do: [n, N_IN] of rank 64, and noise."""
    rng = np.random.default_rng(99)
    mix = rng.standard_normal((64, N_IN)) * np.exp(rng.standard_normal(64))[:, None]
    rng = np.random.default_rng(seed)
    made = rng.standard_normal((n, 64)) @ mix + 0.5 * rng.standard_normal((n, N_IN))
    return made.astype(np.float32)


def products(x: NDArray[np.float32]) -> NDArray[np.float32]:
    blocks = x.reshape(len(x), -1, 256)
    return np.einsum("nbi,nbj->bij", blocks, blocks)


def weights() -> NDArray[np.float32]:
    return np.random.default_rng(1).standard_normal((N_ROWS, N_IN)).astype(np.float32)


def values(kind: Type, data: NDArray[np.uint8]) -> NDArray[np.float64]:
    rows = data.reshape(N_ROWS, -1)
    return dequantize(rows, gguf.GGMLQuantizationType(int(kind))).astype(np.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_less_comes_out_wrong(kind: Type) -> None:
    """On other inputs than those that were counted."""
    seen, other, w = inputs(2), inputs(3), weights()
    plain = by_libggml(kind, w, np.square(seen).mean(axis=0))
    fed = plain.copy()
    feed_back(kind, w, fed.data, factors(products(seen), "w"))
    errors = [np.square(other @ (values(kind, d) - w).T).sum() for d in (plain, fed)]
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("kind", KINDS)
def test_without_anything_in_common_levels_stay(kind: Type) -> None:
    """The nearest level to a weight is libggml's choice too, but for ties."""
    w = weights()
    plain = by_libggml(kind, w, np.ones(N_IN, np.float32))
    fed = plain.copy()
    feed_back(kind, w, fed.data, factors(np.stack([np.eye(256, dtype=np.float32)] * 2), "w"))
    assert np.mean(values(kind, fed) != values(kind, plain)) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_columns_to_come_are_moved_to_where_they_do_most(kind: Type) -> None:
    """By least squares over all of them anew, after each column, in float64."""
    w, c = weights()[:, :256], products(inputs(2))[0].astype(np.float64)
    found = by_libggml(kind, w, np.ones(256, np.float32))
    feed_back(kind, w, found.data, factors(c[None].astype(np.float32), "w"))
    got = values(kind, found)
    lowest, highest = (values(kind, with_levels(kind, found, byte)) for byte in (0x00, 0xFF))
    half = (highest - lowest) / {Type.Q4_K: 15, Type.Q5_K: 31, Type.Q6_K: 63}[kind] / 2
    c += 0.1 * np.trace(c) / 256 * np.eye(256)
    x = w.astype(np.float64)
    for i in range(255):
        x[:, i + 1 :] += np.outer(x[:, i] - got[:, i], np.linalg.solve(c[i + 1 :, i + 1 :], c[i + 1 :, i]))
    ends = np.sort([lowest, highest], axis=0)
    assert np.all(np.abs(got - x.clip(*ends)) <= np.abs(half) * 1.001)
    assert np.mean(np.abs(got - w) > np.abs(half) * 1.1) > 0.1  # not the level next to the weight itself


def with_levels(kind: Type, data: NDArray[np.uint8], byte: int) -> NDArray[np.uint8]:
    """Blocks as they are, but for all of their levels."""
    first, end = {Type.Q4_K: (16, 144), Type.Q5_K: (16, 176), Type.Q6_K: (0, 192)}[kind]
    blocks = data.reshape(-1, {Type.Q4_K: 144, Type.Q5_K: 176, Type.Q6_K: 210}[kind]).copy()
    blocks[:, first:end] = byte
    return blocks.reshape(-1)


def test_products_of_nothing_are_refused() -> None:
    damaged = np.full((1, 256, 256), 5.0, np.float32)
    damaged[0, 3] = np.nan
    for block in (damaged, -products(inputs(2))[:1]):
        with pytest.raises(GGUFError, match="products for blk"):
            factors(block, "blk.0.attn_q.weight")


def test_inputs_that_never_come_free_no_weight() -> None:
    moves = factors(np.zeros((1, 256, 256), np.float32), "w")
    assert np.array_equal(moves[0], np.eye(256))
