"""Bounds and costs of pictures by level of detail."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvl.runtime.detail.bounds import LOW_TOKENS, Bounds, affordable_tokens, max_pixels
from qvl.runtime.detail.cost import Throughput, cost, seconds, work
from qvl.runtime.families.qwen2_vl.tower import VisionConfig
from qvl.runtime.vision.preprocess import Preprocessor

TWO_B = VisionConfig(32, 1280, 5120, 16, 1536, 14, 2, 1e-6)
OWN = Preprocessor()
TOKEN = 28 * 28
throughputs = st.builds(Throughput, st.integers(4, 4096), st.floats(1e-4, 1e3), st.floats(0, 1))


def test_the_work_is_the_tower_s() -> None:
    """665 million parameters (Qwen2-VL paper, table 1: 675M), each in a product with every patch."""
    per_patch = (work(TWO_B, 2) - 2 * (work(TWO_B, 1))) / 2  # what is quadratic
    linear = work(TWO_B, 1) - per_patch
    assert linear / 2 == pytest.approx(32 * (4 * 1280**2 + 2 * 1280 * 5120) + 5120 * (5120 + 1536) / 4)
    assert per_patch == pytest.approx(1.5 * 4 * 32 * 1280)  # q·k and the sum of v, 2 operations each


@given(throughputs, st.floats(0.01, 1000))
def test_the_budget_buys_what_it_says(throughput: Throughput, budget: float) -> None:
    tokens = affordable_tokens(TWO_B, throughput, budget)
    assert tokens >= LOW_TOKENS
    if tokens > LOW_TOKENS:
        assert seconds(TWO_B, throughput, tokens) <= budget
    more = tokens * 3 // 2 if tokens & (tokens - 1) == 0 else tokens * 4 // 3
    assert more > 1 << 20 or seconds(TWO_B, throughput, more) > budget


@given(throughputs, st.floats(0.01, 100), st.integers(1, 20000))
def test_more_costs_more(throughput: Throughput, factor: float, tokens: int) -> None:
    slower = replace(throughput, encode_seconds=throughput.encode_seconds * (1 + factor))
    assert seconds(TWO_B, throughput, tokens + 1) > seconds(TWO_B, throughput, tokens)
    assert seconds(TWO_B, slower, tokens) > seconds(TWO_B, throughput, tokens)
    assert affordable_tokens(TWO_B, slower) <= affordable_tokens(TWO_B, throughput)


def test_what_was_timed_costs_what_it_took() -> None:
    assert seconds(TWO_B, Throughput(1024, 1.7, 0.006), 256) == pytest.approx(1.7 + 256 * 0.006)


@given(throughputs, st.integers(1, 5000), st.integers(1, 5000), st.integers(64, 1 << 17))
def test_auto_lies_between_low_and_high(throughput: Throughput, width: int, height: int, n_ctx: int) -> None:
    if max(width, height) > 200 * min(width, height):
        return
    tokens = {}
    for detail in ("low", "auto", "high"):
        bound = max_pixels(detail, OWN, TWO_B, throughput, n_ctx=n_ctx)  # type: ignore[arg-type]
        tokens[detail] = cost(OWN.with_pixels(max_pixels=bound), width, height).tokens
    assert tokens["low"] <= tokens["auto"] <= tokens["high"] == OWN.n_tokens(height, width)
    slack = LOW_TOKENS - 2 * (max(width, height) // min(width, height) + 20)  # sides are cut to whole tokens
    assert tokens["auto"] >= min(tokens["high"], slack)


def test_the_context_bounds_auto() -> None:
    fast = Throughput(1024, 1e-6, 1e-9)
    assert max_pixels("auto", OWN, TWO_B, fast, n_ctx=8192) == 4096 * TOKEN
    assert max_pixels("auto", OWN, TWO_B, fast, n_ctx=64) == LOW_TOKENS * TOKEN
    assert max_pixels("auto", OWN, TWO_B) == OWN.max_pixels


@pytest.mark.parametrize("detail", ["low", "auto", "high"])
def test_a_model_s_own_bound_is_kept(detail: str) -> None:
    small = OWN.with_pixels(max_pixels=36 * TOKEN)
    assert max_pixels(detail, small, TWO_B, Throughput(256, 0.1, 0.01)) == 36 * TOKEN  # type: ignore[arg-type]


@given(throughputs, st.none() | st.integers(TOKEN, 1 << 22), st.none() | st.integers(TOKEN, 1 << 22))
def test_bounds_follow_the_request(throughput: Throughput, low: int | None, high: int | None) -> None:
    """Those in pixels go first, then the detail, then the default; the lower one is always kept."""
    if low is not None and high is not None and low > high:
        return
    for detail in (None, "low", "auto", "high"):
        bounds = Bounds(low, high, detail, default_tokens=1280)  # type: ignore[arg-type]
        found = bounds.apply(OWN, TWO_B, throughput)
        assert low is None or found.min_pixels == low
        expected = 1280 * TOKEN
        if detail is not None:
            expected = max_pixels(detail, OWN, TWO_B, throughput)  # type: ignore[arg-type]
        assert found.max_pixels == (high if high is not None else max(expected, low or 0))
    assert Bounds().apply(OWN, TWO_B) == OWN
