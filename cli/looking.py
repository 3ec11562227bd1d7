"""How large pictures are looked at in a chat, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final, get_args

from qvl.cli.attachments import Attachment
from qvl.cli.conversation import size_of
from qvl.cli.output import Output, format_table, human_seconds
from qvl.runtime.vision.detail import LOW_TOKENS, Cost, Detail, cost, max_pixels

if TYPE_CHECKING:
    from qvl.runtime.model import Model
    from qvl.runtime.vision.detail import Pace

_HEADER: Final = ("--image-detail", "--max-pixels", "looked at as", "tokens", "about")


@dataclass(frozen=True)
class Looking:
    """Says how to look at each picture and video that is attached.

    Attributes:
        detail: None keeps to the bounds that the model was opened with.
        fps: frames of a video to look at a second; None is the usual two.
    """

    model: Model
    detail: Detail | None
    out: Output
    fps: float | None = None

    def __hash__(self) -> int:
        return id(self)

    def bounded(self, attachment: Attachment) -> Attachment:
        """The attachment with the area to look at, where the detail asks for less than there is."""
        if attachment.kind == "video" and self.fps is not None:
            return replace(attachment, options=(*attachment.options, ("fps", self.fps)))
        if attachment.kind != "image" or self.detail is None:
            return attachment
        preprocessor = self.model.vision.preprocessor
        width, height = size_of(attachment.path)
        if preprocessor.n_tokens(height, width) <= LOW_TOKENS:
            return attachment
        bound = self.max_pixels(self.detail)
        tall, wide = preprocessor.size(height, width)
        if tall * wide <= bound:
            return attachment
        return replace(attachment, options=(*attachment.options, ("max_pixels", bound)))

    def max_pixels(self, detail: Detail) -> int:
        """The area that a detail stands for with this model, here."""
        vision = self.model.vision
        pace = self.pace if detail == "auto" else None
        return max_pixels(detail, vision.preprocessor, vision.config, pace, n_ctx=self.model.n_ctx)

    @cached_property
    def pace(self) -> Pace:
        from qvl.runtime.measure.pace import known_pace

        return known_pace(
            self.model, announce=lambda: self.out.dim("measuring the pace of this machine, once")
        )

    def words(self, attachment: Attachment) -> str:
        """What a picture costs, and what it would in full.

        "(4032 x 3024, looked at as 812 x 616: 638 tokens, about 9 s; in full 15552 tokens, about 11 min)"
        """
        if attachment.kind == "video":
            return ""
        width, height = size_of(attachment.path)
        bound = dict(attachment.options).get("max_pixels")
        full = self._cost(width, height, None)
        if bound is None:
            return f"({width} x {height}, {_price(full)})"
        found = self._cost(width, height, int(bound))
        looked = f"looked at as {found.size[0]} x {found.size[1]}: {_price(found)}"
        return f"({width} x {height}, {looked}; in full {_price(full)})"

    def table(self, path: Path) -> str:
        """What each detail makes of a picture."""
        width, height = size_of(path)
        rows = []
        for detail in get_args(Detail):
            bound = self.max_pixels(detail)
            found = self._cost(width, height, bound)
            about = human_seconds(found.seconds) if found.seconds is not None else ""
            rows.append((detail, str(bound), f"{found.size[0]} x {found.size[1]}", str(found.tokens), about))
        return format_table(rows, _HEADER)

    def _cost(self, width: int, height: int, bound: int | None) -> Cost:
        vision = self.model.vision
        preprocessor = vision.preprocessor.with_pixels(max_pixels=bound)
        # what costs next to nothing is not worth a measurement
        large = preprocessor.n_tokens(height, width) > LOW_TOKENS
        if not large and "pace" not in self.__dict__:
            return cost(preprocessor, width, height)
        return cost(preprocessor, width, height, vision.config, self.pace)


def _price(found: Cost) -> str:
    about = "" if found.seconds is None else f", about {human_seconds(found.seconds)}"
    return f"{found.tokens} tokens{about}"
