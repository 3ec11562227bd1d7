"""Detail of the pictures and videos of a chat: bounds of their size, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Final, get_args

from qvl.cli.chat.attachments import Attachment
from qvl.cli.layout import format_table
from qvl.cli.output import human_seconds
from qvl.runtime.detail.bounds import LOW_TOKENS, Bounds, Detail
from qvl.runtime.detail.cost import Cost
from qvl.runtime.detail.estimator import Estimator
from qvl.runtime.prompt.messages import VisionChunk
from qvl.runtime.vision.preprocess import Preprocessor
from qvl.runtime.vision.size import size_of
from qvl.runtime.vision.video import FRAME_FACTOR, VideoPlan, plan_video
from qvl.runtime.vision.video_options import VideoOptions

if TYPE_CHECKING:
    from qvl.runtime.model import Model
    from qvl.runtime.vision.encoder import VisionEncoder

_HEADER: Final = ("--image-detail", "--max-pixels", "resized to", "tokens", "about")


def kept_whole(
    attachments: Sequence[Attachment], detail: Detail | None, vision: VisionEncoder
) -> list[VisionChunk]:
    """The pictures that `DetailPolicy` does not shrink, found without the text model.

    Raises:
        ImageError: one cannot be read.
    """
    return [
        VisionChunk(a.kind, str(a.path), a.options)
        for a in attachments
        if a.kind == "image" and (detail in (None, "high") or _is_small(vision.preprocessor, a.path))
    ]


def _is_small(preprocessor: Preprocessor, path: Path) -> bool:
    width, height = size_of(path)
    return preprocessor.n_tokens(height, width) <= LOW_TOKENS


@dataclass(frozen=True, eq=False)
class DetailPolicy:
    """Bounds each picture and video that is attached, and describes its cost.

    Attributes:
        detail: None keeps to the bounds that the model was opened with.
        fps: frames to sample from a second of video; None is the family's own rate.
    """

    model: Model
    detail: Detail | None
    fps: float | None = None
    estimator: Estimator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        estimator = Estimator(self.model, n_ctx=self.model.n_ctx, refine=True)
        object.__setattr__(self, "estimator", estimator)

    def bounded(self, attachment: Attachment) -> Attachment:
        """The attachment with the options that keep it within the bounds; unchanged where it is.

        Raises:
            ImageError, VideoError: it cannot be read.
        """
        if attachment.kind == "video":
            return self._bounded_video(attachment)
        own = self.model.vision.preprocessor
        if self.detail is None or _is_small(own, attachment.path):
            return attachment
        width, height = size_of(attachment.path)
        tall, wide = own.size(height, width)
        bound = self._max_pixels(self.detail)
        if tall * wide <= bound:
            return attachment
        return replace(attachment, options=(*attachment.options, ("max_pixels", bound)))

    def _max_pixels(self, detail: Detail) -> int:
        return self.estimator.preprocessor(Bounds(detail=detail)).max_pixels

    def _bounded_video(self, attachment: Attachment) -> Attachment:
        """With the rate, and unless the detail is high, within half of the context."""
        if self.fps is not None:
            attachment = replace(attachment, options=(*attachment.options, ("fps", self.fps)))
        room = self.model.n_ctx // 2
        whole = self._plan(attachment)
        if self.detail in (None, "high") or self.estimator.video(whole).tokens <= room:
            return attachment
        preprocessor = self.model.vision.preprocessor
        total = ("total_pixels", room * preprocessor.factor**2)
        smaller = replace(attachment, options=(*attachment.options, total))
        tokens = self.estimator.video(self._plan(smaller)).tokens
        if tokens <= room:
            return smaller
        frames = max(FRAME_FACTOR, whole.n_frames * room // tokens // FRAME_FACTOR * FRAME_FACTOR)
        lasts = whole.seconds or whole.n_frames / preprocessor.sampling.fps
        text = self.estimator.video(replace(whole, n_frames=frames, seconds=lasts)).text_tokens
        few = (
            ("total_pixels", max(1, room - text) * preprocessor.factor**2),
            ("max_frames", frames),
            ("min_frames", min(frames, preprocessor.sampling.min_frames)),
        )
        return replace(attachment, options=(*attachment.options, *few))

    def _plan(self, attachment: Attachment) -> VideoPlan:
        path, preprocessor = attachment.path, self.model.vision.preprocessor
        options = preprocessor.sampling.given(attachment.options)
        return _plan(path, path.stat().st_mtime_ns, preprocessor, options)

    def is_shrunk(self, attachment: Attachment) -> bool:
        """True if it is bounded below its full size."""
        return any(name in ("max_pixels", "total_pixels") for name, _ in attachment.options)

    def describe(self, attachment: Attachment) -> str:
        """Size and cost of a picture or video, and its cost in full where it is shrunk.

        "(4032 x 3024, resized to 812 x 616: 638 tokens, about 9 s; in full 15552 tokens, about 11 min)"
        "(12 s, 24 frames of 364 x 196: 1092 tokens, about 8 s)"
        """
        if attachment.kind == "video":
            return self._describe_video(attachment)
        width, height = size_of(attachment.path)
        full = self.estimator.picture(width, height)
        bound = dict(attachment.options).get("max_pixels")
        if bound is None:
            return f"({width} x {height}, {_price(full, brief=True)})"
        found = self.estimator.picture(width, height, Bounds(max_pixels=int(bound)))
        resized = f"resized to {found.size[0]} x {found.size[1]}: {_price(found)}"
        return f"({width} x {height}, {resized}; in full {_price(full, brief=True)})"

    def _describe_video(self, attachment: Attachment) -> str:
        plan = self._plan(attachment)
        lasts = f"{human_seconds(plan.seconds)}, " if plan.seconds is not None else ""
        words = f"{lasts}{self._price_of_video(plan)}"
        if self.is_shrunk(attachment):
            kept = tuple(o for o in attachment.options if o[0] == "fps")
            words += f"; in full {self._price_of_video(self._plan(replace(attachment, options=kept)))}"
        return f"({words})"

    def _price_of_video(self, plan: VideoPlan) -> str:
        found = self.estimator.video(plan)
        return f"{plan.n_frames} frames of {found.size[0]} x {found.size[1]}: {_price(found, brief=True)}"

    def table(self, path: Path, columns: int | None = None) -> str:
        """The size and cost of a picture at each level of detail, as a table."""
        width, height = size_of(path)
        rows = []
        for detail in get_args(Detail):
            found = self.estimator.picture(width, height, Bounds(detail=detail))
            size = f"{found.size[0]} x {found.size[1]}"
            about = human_seconds(found.seconds) if found.seconds is not None else ""
            rows.append((detail, str(self._max_pixels(detail)), size, str(found.tokens), about))
        return format_table(rows, _HEADER, width=columns)


@lru_cache(maxsize=64)
def _plan(path: Path, changed: int, preprocessor: Preprocessor, options: VideoOptions) -> VideoPlan:
    return plan_video(path, preprocessor, options)


def _price(found: Cost, *, brief: bool = False) -> str:
    """Tokens and seconds; `brief` leaves out the seconds of small pictures."""
    if found.seconds is None or (brief and found.tokens <= LOW_TOKENS):
        return f"{found.tokens} tokens"
    return f"{found.tokens} tokens, about {human_seconds(found.seconds)}"
