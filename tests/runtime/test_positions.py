"""M-RoPE positions against get_rope_index, as transformers 4.57 has it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvl.runtime.errors import InputError
from qvl.runtime.prompt.positions import Span, TextSpan, VisionSpan, mrope_positions

TEXT, IMAGE, VIDEO = 0, 1, 2

text_spans = st.builds(TextSpan, st.integers(1, 40))
image_spans = st.builds(VisionSpan, t=st.just(1), h=st.integers(1, 12), w=st.integers(1, 12))
video_spans = st.builds(VisionSpan, t=st.integers(1, 20), h=st.integers(1, 6), w=st.integers(1, 6))


@st.composite
def layouts(draw: st.DrawFn) -> list[Span]:
    """Text and vision in any order; as in the template, text stands between two vision spans."""
    spans: list[Span] = []
    for _ in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from((TEXT, IMAGE, VIDEO)))
        if kind != TEXT and spans and isinstance(spans[-1], VisionSpan):
            spans.append(draw(text_spans))
        spans.append(draw((text_spans, image_spans, video_spans)[kind]))
    return spans


def by_walking_tokens(spans: list[Span]) -> list[tuple[int, int, int]]:
    """The rule of get_rope_index token by token, on a token sequence, without any of our arithmetic."""
    kinds = [i for i, span in enumerate(spans) for _ in range(_count(span))]
    out: list[tuple[int, int, int]] = []
    i = 0
    while i < len(kinds):
        begin = max((max(p) for p in out), default=-1) + 1
        span = spans[kinds[i]]
        if isinstance(span, TextSpan):
            out.extend((begin + k, begin + k, begin + k) for k in range(span.n))
            i += span.n
            continue
        for t in range(span.t):
            for h in range(span.h):
                for w in range(span.w):
                    out.append((begin + t, begin + h, begin + w))
                    i += 1
    return out


def _count(span: Span) -> int:
    return span.n if isinstance(span, TextSpan) else span.t * span.h * span.w


@settings(max_examples=2000, deadline=None)
@given(layouts())
def test_matches_the_rule_walked_token_by_token(spans: list[Span]) -> None:
    positions, following = mrope_positions(spans)
    expected = by_walking_tokens(spans)
    assert positions.dtype == np.int32
    assert positions.T.tolist() == [list(p) for p in expected]
    assert following == max(max(p) for p in expected) + 1


@settings(max_examples=200, deadline=None)
@given(layouts(), layouts(), st.integers(0, 10_000))
def test_a_prompt_continues_where_its_prefix_ended(first: list[Span], second: list[Span], start: int) -> None:
    whole, end = mrope_positions(first + second, start)
    head, middle = mrope_positions(first, start)
    tail, last = mrope_positions(second, middle)
    assert np.array_equal(whole, np.concatenate([head, tail], axis=1))
    assert end == last


@settings(max_examples=200, deadline=None)
@given(layouts())
def test_time_never_falls_and_text_is_beyond_all_before_it(spans: list[Span]) -> None:
    # llama.cpp's KV cache masks by the time row and needs both
    positions, _ = mrope_positions(spans)
    assert (np.diff(positions[0]) >= 0).all()
    cell = 0
    for span in spans:
        if isinstance(span, TextSpan) and cell:
            assert positions[0, cell] > positions[:, :cell].max()
        cell += span.n_tokens


def test_worked_example() -> None:
    positions, following = mrope_positions([TextSpan(3), VisionSpan(t=1, h=2, w=3), TextSpan(2)])
    assert positions.tolist() == [
        [0, 1, 2, 3, 3, 3, 3, 3, 3, 6, 7],
        [0, 1, 2, 3, 3, 3, 4, 4, 4, 6, 7],
        [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7],
    ]
    assert following == 8


def test_a_long_video_advances_by_its_time() -> None:
    # paper: largest id so far plus one; transformers 5 would begin the text at 2
    positions, following = mrope_positions([VisionSpan(t=5, h=2, w=2), TextSpan(1)])
    assert positions[:, -1].tolist() == [5, 5, 5]
    assert following == 6


def test_nothing_and_empty_text() -> None:
    positions, following = mrope_positions([], start=7)
    assert positions.shape == (3, 0) and following == 7
    assert mrope_positions([TextSpan(0)], start=3)[1] == 3


@pytest.mark.parametrize("grid", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (1, -2, 1)])
def test_an_empty_grid_is_refused(grid: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match="1 or more"):
        VisionSpan(*grid)
    with pytest.raises(InputError, match="0 or more"):
        TextSpan(-1)


@pytest.mark.parity
def test_matches_transformers() -> None:
    """Live: thousands of layouts, with videos no longer than high or wide, where transformers 5 holds."""
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.qwen2_vl.modeling_qwen2_vl")
    config = pytest.importorskip("transformers").Qwen2VLConfig()
    model = modeling.Qwen2VLModel.__new__(modeling.Qwen2VLModel)
    torch.nn.Module.__init__(model)
    model.config = config
    rng = np.random.default_rng(0)
    for _ in range(3000):
        spans, kinds, grids = _random_layout(rng)
        counts = [span.n_tokens for span in spans]
        types = torch.from_numpy(np.repeat(kinds, counts)[None])
        got, _ = mrope_positions(spans)
        want, delta = model.get_rope_index(
            torch.zeros_like(types),
            mm_token_type_ids=types,
            image_grid_thw=torch.tensor(grids[IMAGE]) if grids[IMAGE] else None,
            video_grid_thw=torch.tensor(grids[VIDEO]) if grids[VIDEO] else None,
        )
        assert np.array_equal(got, want[:, 0].numpy()), spans
        assert mrope_positions(spans)[1] == types.shape[1] + int(delta[0, 0])


def _random_layout(rng: np.random.Generator) -> tuple[list[Span], list[int], dict[int, list[list[int]]]]:
    spans: list[Span] = []
    kinds: list[int] = []
    grids: dict[int, list[list[int]]] = {IMAGE: [], VIDEO: []}
    for _ in range(rng.integers(1, 7)):
        kind = int(rng.integers(0, 3))
        if spans and kind == kinds[-1] == TEXT:
            continue
        if kind != TEXT and spans and kinds[-1] != TEXT:
            spans.append(TextSpan(2))
            kinds.append(TEXT)
        if kind == TEXT:
            spans.append(TextSpan(int(rng.integers(1, 30))))
        else:
            h, w = (int(n) for n in rng.integers(1, 9, 2))
            t = 1 if kind == IMAGE else int(rng.integers(1, max(h, w) + 1))
            spans.append(VisionSpan(t, h, w))
            grids[kind].append([t, 2 * h, 2 * w])
        kinds.append(kind)
    return spans, kinds, grids
