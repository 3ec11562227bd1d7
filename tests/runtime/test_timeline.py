"""Places of frames from the timestamps of packets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvl.runtime.vision.clip import Timeline


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=200, unique=True), st.data())
def test_places_are_those_of_the_sorted_times(times: list[int], data: st.DataObject) -> None:
    rising = sorted(times)
    timeline = Timeline.of([(time, i % 7 == 0) for i, time in enumerate(rising)])
    assert timeline is not None
    at = data.draw(st.integers(0, len(rising) - 1))
    assert timeline.place(rising[at]) == at
    assert timeline.place(-1) is None
    assert timeline.keys.tolist() == list(range(0, len(rising), 7))


@pytest.mark.parametrize(
    "packets",
    [
        [],
        [(0, True), (None, False)],
        [(0, True), (1, False), (1, False)],
        [(i, True) for i in range(300)] + [(i, True) for i in range(-300, 0)],
    ],
    ids=["none", "a time is missing", "two at one time", "times begin anew"],
)
def test_times_that_say_no_place(packets: list[tuple[int | None, bool]]) -> None:
    assert Timeline.of(packets) is None
