"""Mentions of a conversation's pictures in a text: "Picture 2", "the first image", "in b.png".

Pictures are numbered as `number_images` labels them, from 1, in the order of the conversation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

_NUMBERS: Final = (
    ("one", "first"), ("two", "second"), ("three", "third"), ("four", "fourth"), ("five", "fifth"),
    ("six", "sixth"), ("seven", "seventh"), ("eight", "eighth"), ("nine", "ninth"), ("ten", "tenth"),
)  # fmt: skip
_CARDINALS: Final = {pair[0]: i for i, pair in enumerate(_NUMBERS, 1)}
_ORDINALS: Final = {pair[1]: i for i, pair in enumerate(_NUMBERS, 1)}
_NOUN: Final = r"(?:picture|image|photo|photograph|pic)"
_MENTION: Final = re.compile(
    rf"\b{_NOUN}\s*(?:no\.|number|\#)?\s*(?P<number>\d{{1,4}}|{'|'.join(_CARDINALS)})\b"
    rf"|\b(?P<place>\d{{1,4}}(?=st|nd|rd|th)|{'|'.join(_ORDINALS)}|last)(?:st|nd|rd|th)?\s+{_NOUN}\b",
    re.IGNORECASE,
)


def mentioned(text: str, names: Sequence[str]) -> list[int]:
    """Numbers of the pictures that a text names, in the order in which it does.

    Args:
        names: file names of all pictures, which count as mentions too; numbers beyond them do not.
    """
    found: list[tuple[int, int]] = []
    for match in _MENTION.finditer(text):
        word = (match["number"] or match["place"]).lower()
        number = len(names) if word == "last" else _CARDINALS.get(word) or _ORDINALS.get(word) or int(word)
        found.append((match.start(), number))
    for number, name in enumerate(names, 1):
        found += [(m.start(), number) for m in re.finditer(rf"(?<!\w){re.escape(name)}(?!\w)", text)]
    return [number for _, number in sorted(found) if 1 <= number <= len(names)]


def picture_of(reply: str, question: str, names: Sequence[str]) -> int:
    """The number of the picture that a box is in.

    That is the one that the reply has named last before the box; else the one that the question names, if it
    names one; else the last.

    Args:
        reply: as far as it goes before the box.
        names: file names of all pictures, at least one.
    """
    if said := mentioned(reply, names):
        return said[-1]
    asked = set(mentioned(question, names))
    return asked.pop() if len(asked) == 1 else len(names)
