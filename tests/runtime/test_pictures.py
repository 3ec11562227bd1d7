"""Mentions of pictures in texts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvl.runtime.grounding.mention import mentioned, picture_of

NAMES = ["a.png", "holiday photo.jpg", "c.webp", "a.png"]


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("Picture 2: the cat", [2]),
        ("in the first picture and the THIRD image", [1, 3]),
        ("image #4, photo no. 1, picture two", [4, 1, 2]),
        ("the 2nd photo and the last one; the last picture", [2, 4]),
        ("in holiday photo.jpg, not in c.webp", [2, 3]),
        ("in a.png", [1, 4]),
        ("picture 5, picture 0, the tenth image", []),
        ("a picture of 3 cats; one picture; pictures 1; the first cat; picture 22", []),
        ("", []),
    ],
)
def test_mentions(text: str, numbers: list[int]) -> None:
    assert mentioned(text, NAMES) == numbers


@pytest.mark.parametrize(
    ("reply", "question", "number"),
    [
        ("", "Where is the cat?", 4),
        ("", "Where is the cat in the second picture?", 2),
        ("Picture 1: a cat. Picture 3: ", "Where is the cat in picture 2?", 3),
        ("", "Is it picture 1 or picture 2 that has the cat?", 4),
        ("", "In picture 1, yes, picture 1.", 1),
        ("The cat ", "Find it in c.webp", 3),
    ],
)
def test_the_reply_goes_before_the_question(reply: str, question: str, number: int) -> None:
    assert picture_of(reply, question, NAMES) == number


@given(st.text(), st.text(), st.lists(st.text(min_size=1), min_size=1, max_size=5))
def test_there_is_always_one(reply: str, question: str, names: list[str]) -> None:
    assert 1 <= picture_of(reply, question, names) <= len(names)
