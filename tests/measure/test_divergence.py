"""Figures of divergence, against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from qvl.runtime.measure.divergence import Predictions, VisionTally, log_softmax

LOGITS = arrays(np.float32, (5, 7), elements=st.floats(-30, 30, width=32))


@given(LOGITS, LOGITS)
def test_kl_is_its_definition(a: np.ndarray, b: np.ndarray) -> None:
    reply = [0, 1, 2, 3, 6]
    tally = Predictions()
    tally.add(a, b, reply)
    found = tally.result()
    p = np.exp(a.astype(np.float64)) / np.exp(a.astype(np.float64)).sum(axis=1, keepdims=True)
    q = np.exp(b.astype(np.float64)) / np.exp(b.astype(np.float64)).sum(axis=1, keepdims=True)
    kl = (p * np.log(p / q)).sum(axis=1)
    assert found.kl_mean == pytest.approx(kl.mean(), abs=1e-9)
    assert found.kl_max == pytest.approx(kl.max(), abs=1e-9)
    assert found.perplexity == pytest.approx(np.exp(-np.log(q[range(5), reply]).mean()), rel=1e-6)
    own = np.exp(-np.log(p[range(5), reply]).mean())
    assert found.perplexity_change == pytest.approx(found.perplexity / own - 1, rel=1e-6, abs=1e-9)


@given(LOGITS)
def test_a_model_does_not_diverge_from_itself(a: np.ndarray) -> None:
    a = np.round(a * 1024) / np.float32(1024)  # so that the sum is exact
    tally = Predictions()
    tally.add(a, a + np.float32(3), [0] * 5)
    tally.add(a, a, [1] * 5)
    found = tally.result()
    assert found.kl_max < 1e-6
    assert found.top1 == found.same_replies == 1
    assert found.n_tokens == 10


def test_where_replies_part() -> None:
    favourites = np.eye(4, dtype=np.float32) * 9
    other = favourites.copy()
    other[2] = favourites[0]
    tally = Predictions()
    tally.add(favourites, other, [0, 1, 2, 3])
    tally.add(favourites, favourites, [0, 1, 2, 3])
    found = tally.result()
    assert found.parted == (2, None)
    assert (found.top1, found.same_replies) == (7 / 8, 1 / 2)


def test_rows_that_pad_a_vocabulary_do_not_count() -> None:
    a = np.zeros((2, 3), np.float32)
    tally = Predictions()
    tally.add(a, np.concatenate([a, np.full((2, 5), 20, np.float32)], axis=1), [0, 1])
    assert tally.result().kl_max == 0


def test_probabilities_of_large_logits() -> None:
    assert np.exp(log_softmax(np.array([[1e4, 1e4, -1e4]], np.float32)))[0] == pytest.approx([0.5, 0.5, 0])


def test_errors_of_embeddings() -> None:
    tally = VisionTally()
    tally.add(np.array([[3.0, 0], [0, 4]], np.float32), np.array([[3.0, 0], [0, 4]], np.float32))
    assert tally.result().relative == 0
    tally.add(np.array([[0.0, 12]], np.float32), np.array([[5.0, 12]], np.float32))
    found = tally.result()
    assert found.relative == pytest.approx(5 / 13)
    assert found.worst_cosine == pytest.approx(12 / 13)
    assert found.n_tokens == 3
