"""How large to look at a picture."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvl.runtime.detail.cost import LOW_TOKENS, Pace, affordable_tokens, cost, max_pixels, seconds, work
from qvl.runtime.families.qwen2_vl.tower import VisionConfig
from qvl.runtime.vision.preprocess import Preprocessor

TWO_B = VisionConfig(32, 1280, 5120, 16, 1536, 14, 2, 1e-6)
OWN = Preprocessor()
TOKEN = 28 * 28
paces = st.builds(Pace, st.integers(4, 4096), st.floats(1e-4, 1e3), st.floats(0, 1))


def test_the_work_is_the_tower_s() -> None:
    """665 million parameters (Qwen2-VL paper, table 1: 675M), each in a product with every patch."""
    per_patch = (work(TWO_B, 2) - 2 * (work(TWO_B, 1))) / 2  # what is quadratic
    linear = work(TWO_B, 1) - per_patch
    assert linear / 2 == pytest.approx(32 * (4 * 1280**2 + 2 * 1280 * 5120) + 5120 * (5120 + 1536) / 4)
    assert per_patch == pytest.approx(1.5 * 4 * 32 * 1280)  # q·k and the sum of v, 2 operations each


@given(paces, st.floats(0.01, 1000))
def test_the_budget_buys_what_it_says(pace: Pace, budget: float) -> None:
    tokens = affordable_tokens(TWO_B, pace, budget)
    assert tokens >= LOW_TOKENS
    if tokens > LOW_TOKENS:
        assert seconds(TWO_B, pace, tokens) <= budget
    more = tokens * 3 // 2 if tokens & (tokens - 1) == 0 else tokens * 4 // 3
    assert more > 1 << 20 or seconds(TWO_B, pace, more) > budget


@given(paces, st.floats(0.01, 100), st.integers(1, 20000))
def test_more_costs_more(pace: Pace, factor: float, tokens: int) -> None:
    slower = replace(pace, encode_seconds=pace.encode_seconds * (1 + factor))
    assert seconds(TWO_B, pace, tokens + 1) > seconds(TWO_B, pace, tokens)
    assert seconds(TWO_B, slower, tokens) > seconds(TWO_B, pace, tokens)
    assert affordable_tokens(TWO_B, slower) <= affordable_tokens(TWO_B, pace)


def test_what_was_timed_costs_what_it_took() -> None:
    assert seconds(TWO_B, Pace(1024, 1.7, 0.006), 256) == pytest.approx(1.7 + 256 * 0.006)


@given(paces, st.integers(1, 5000), st.integers(1, 5000), st.integers(64, 1 << 17))
def test_auto_lies_between_low_and_high(pace: Pace, width: int, height: int, n_ctx: int) -> None:
    if max(width, height) > 200 * min(width, height):
        return
    tokens = {}
    for detail in ("low", "auto", "high"):
        bound = max_pixels(detail, OWN, TWO_B, pace, n_ctx=n_ctx)  # type: ignore[arg-type]
        tokens[detail] = cost(OWN.with_pixels(max_pixels=bound), width, height).tokens
    assert tokens["low"] <= tokens["auto"] <= tokens["high"] == OWN.n_tokens(height, width)
    slack = LOW_TOKENS - 2 * (max(width, height) // min(width, height) + 20)  # sides are cut to whole tokens
    assert tokens["auto"] >= min(tokens["high"], slack)


def test_the_context_bounds_auto() -> None:
    fast = Pace(1024, 1e-6, 1e-9)
    assert max_pixels("auto", OWN, TWO_B, fast, n_ctx=8192) == 4096 * TOKEN
    assert max_pixels("auto", OWN, TWO_B, fast, n_ctx=64) == LOW_TOKENS * TOKEN
    assert max_pixels("auto", OWN, TWO_B) == OWN.max_pixels


@pytest.mark.parametrize("detail", ["low", "auto", "high"])
def test_a_model_s_own_bound_is_kept(detail: str) -> None:
    small = OWN.with_pixels(max_pixels=36 * TOKEN)
    assert max_pixels(detail, small, TWO_B, Pace(256, 0.1, 0.01)) == 36 * TOKEN  # type: ignore[arg-type]
