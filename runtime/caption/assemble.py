"""Captions as they go into the dataset: prefix, trigger words, suffix, and the caption that is there."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

from qvl.runtime.caption.record import Record
from qvl.runtime.errors import ImageError
from qvl.runtime.grounding.readable import read_reply
from qvl.runtime.grounding.tags import GroundingParser
from qvl.runtime.vision.size import PictureInfo, size_of

SEPARATOR: Final = ", "


@dataclass(frozen=True)
class Wording:
    """The words around a caption.

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
        """The caption for the model's text, its start included.

        >>> Wording(prefix="photo of ", triggers=("sks",)).caption("A red square. ")
        'sks, photo of A red square.'
        """
        text = f"{self.prefix}{said.strip()}{self.suffix}"
        missing = [word for word in self.triggers if word.lower() not in text.lower()]
        return SEPARATOR.join([*missing, text])


def join(old: str | None, new: str, mode: Literal["append", "prepend"]) -> str:
    """The old caption with the new one after or before it."""
    if not old:
        return new
    first, second = (old, new) if mode == "append" else (new, old)
    # After a sentence a space; after a list of tags a comma.
    return f"{first} {second}" if first.rstrip().endswith((".", "!", "?")) else f"{first}{SEPARATOR}{second}"


def joined(old: Record, new: Record, mode: Literal["append", "prepend"]) -> Record:
    """The new record with the old one's caption and boxes after or before its own."""
    if not old.caption or new.caption is None:
        return new
    has_markup = old.raw is not None or new.raw is not None
    raw = join(old.raw or old.caption, new.raw or new.caption, mode) if has_markup else None
    return replace(
        new,
        caption=join(old.caption, new.caption, mode),
        captions=tuple(join(old.caption, caption, mode) for caption in new.captions),
        boxes=(*old.boxes, *new.boxes) if mode == "append" else (*new.boxes, *old.boxes),
        raw=raw,
    )


def readable(record: Record) -> Record:
    """The record as it would be written today: earlier versions kept the markup of boxes in the caption."""
    caption = record.caption
    if record.raw is not None or caption is None or "<|box_" not in caption + "".join(record.captions):
        return record
    pictures: list[PictureInfo] = []
    with suppress(ImageError):  # a video, or a picture that is gone
        size = size_of(Path(record.path))
        pictures = [PictureInfo(size, size)]
    text, *others = (read_reply(each, GroundingParser, pictures).text for each in (caption, *record.captions))
    return replace(record, caption=text, captions=tuple(others), raw=caption)
