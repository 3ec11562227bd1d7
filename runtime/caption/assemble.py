"""From what the model said to what stands in the dataset: prefix, trigger words, suffix, the old caption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

SEPARATOR: Final = ", "


@dataclass(frozen=True)
class Wording:
    """What is put around a caption.

    Attributes:
        prefix, suffix: taken as they are, spaces and all.
        triggers: words that must be in the caption; those it lacks are put before it, with commas.
        start: the beginning that was given to the model to continue; a part of the caption.
    """

    prefix: str = ""
    suffix: str = ""
    triggers: Sequence[str] = ()
    start: str = ""

    def caption(self, said: str) -> str:
        """The caption for what the model said after `start`.

        >>> Wording(prefix="photo of ", triggers=("sks",), start="A red").caption(" square.")
        'sks, photo of A red square.'
        """
        text = f"{self.prefix}{(self.start + said).strip()}{self.suffix}"
        missing = [word for word in self.triggers if word.lower() not in text.lower()]
        return SEPARATOR.join([*missing, text])


def join(old: str | None, new: str, mode: Literal["append", "prepend"]) -> str:
    """The old caption with the new one after or before it."""
    if not old:
        return new
    first, second = (old, new) if mode == "append" else (new, old)
    # After a sentence a space; after a list of tags a comma.
    return f"{first} {second}" if first.rstrip().endswith((".", "!", "?")) else f"{first}{SEPARATOR}{second}"
