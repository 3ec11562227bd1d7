"""How large pictures are looked at in a chat, and what that costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Final, get_args

from qvl.cli.chat.attachments import Attachment
from qvl.cli.output import Output, format_table, human_seconds
from qvl.runtime.detail.cost import LOW_TOKENS, Cost, Detail, cost, max_pixels, seconds
from qvl.runtime.prompt.messages import VisionChunk
from qvl.runtime.vision.preprocess import Preprocessor
from qvl.runtime.vision.size import size_of
from qvl.runtime.vision.video import FRAME_FACTOR, VideoPlan, plan_video
from qvl.runtime.vision.video_options import VideoOptions

if TYPE_CHECKING:
    from qvl.runtime.detail.cost import Pace
    from qvl.runtime.model import Model
    from qvl.runtime.vision.encoder import VisionEncoder

_HEADER: Final = ("--image-detail", "--max-pixels", "looked at as", "tokens", "about")


def looked_at_whole(
    attachments: Sequence[Attachment], detail: Detail | None, vision: VisionEncoder
) -> list[VisionChunk]:
    """The pictures that `Looking` will not shrink, as is known before the pace of the machine is.

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
    _known: dict[str, Pace] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.model.vision.on_encoded = self._refine

    def __hash__(self) -> int:
        return id(self)

    def bounded(self, attachment: Attachment) -> Attachment:
        """The attachment with the area to look at, where the detail asks for less than there is.

        Raises:
            ImageError, VideoError: it cannot be read.
        """
        if attachment.kind == "video":
            return self._bounded_video(attachment)
        if self.detail is None:
            return attachment
        preprocessor = self.model.vision.preprocessor
        if _is_small(preprocessor, attachment.path):
            return attachment
        width, height = size_of(attachment.path)
        bound = self.max_pixels(self.detail)
        tall, wide = preprocessor.size(height, width)
        if tall * wide <= bound:
            return attachment
        return replace(attachment, options=(*attachment.options, ("max_pixels", bound)))

    def _bounded_video(self, attachment: Attachment) -> Attachment:
        """With the rate, and, unless all there is should be seen, at most half the context filled."""
        if self.fps is not None:
            attachment = replace(attachment, options=(*attachment.options, ("fps", self.fps)))
        room = self.model.n_ctx // 2
        whole = self._plan(attachment)
        if self.detail in (None, "high") or self._n_tokens(whole) <= room:
            return attachment
        smaller = replace(
            attachment,
            options=(*attachment.options, ("total_pixels", room * self.model.vision.preprocessor.factor**2)),
        )
        tokens = self._n_tokens(self._plan(smaller))
        if tokens <= room:
            return smaller
        frames = max(FRAME_FACTOR, whole.n_frames * room // tokens // FRAME_FACTOR * FRAME_FACTOR)
        few = (
            ("max_frames", frames),
            ("min_frames", min(frames, self.model.vision.preprocessor.sampling.min_frames)),
        )
        return replace(smaller, options=(*smaller.options, *few))

    def _plan(self, attachment: Attachment) -> VideoPlan:
        path, preprocessor = attachment.path, self.model.vision.preprocessor
        options = preprocessor.sampling.given(attachment.options)
        return _plan(path, path.stat().st_mtime_ns, preprocessor, options)

    def _n_tokens(self, plan: VideoPlan) -> int:
        height, width = plan.size
        return -(-plan.n_frames // FRAME_FACTOR) * (
            height * width // self.model.vision.preprocessor.factor**2
        )

    def is_shrunk(self, attachment: Attachment) -> bool:
        """Whether it will be seen in less detail than there is."""
        return any(name in ("max_pixels", "total_pixels") for name, _ in attachment.options)

    def max_pixels(self, detail: Detail) -> int:
        """The area that a detail stands for with this model, here."""
        vision = self.model.vision
        pace = self.pace if detail == "auto" else None
        return max_pixels(detail, vision.preprocessor, vision.config, pace, n_ctx=self.model.n_ctx)

    @property
    def pace(self) -> Pace:
        """How fast this machine is with the model: kept or estimated, refined by each real encoding."""
        if "pace" not in self._known:
            from qvl.runtime.detail.pace import known_pace

            self._known["pace"] = known_pace(self.model)
        return self._known["pace"]

    def _refine(self, patches: int, seconds: float) -> None:
        from qvl.runtime.detail.pace import keep_pace, refined

        before = self.pace
        pace = self._known["pace"] = refined(before, self.model.vision.config, patches, seconds)
        change = pace.encode_seconds / before.encode_seconds
        if pace.measured and (not before.measured or not 0.9 < change < 1.1):
            keep_pace(self.model, pace)

    def words(self, attachment: Attachment) -> str:
        """What a picture or video costs, and what it would in full.

        "(4032 x 3024, looked at as 812 x 616: 638 tokens, about 9 s; in full 15552 tokens, about 11 min)"
        "(12 s, 24 frames of 364 x 196: 1092 tokens, about 8 s)"
        """
        if attachment.kind == "video":
            return self._words_of_video(attachment)
        width, height = size_of(attachment.path)
        bound = dict(attachment.options).get("max_pixels")
        full = self._cost(width, height, None)
        if bound is None:
            return f"({width} x {height}, {_price(full)})"
        found = self._cost(width, height, int(bound))
        looked = f"looked at as {found.size[0]} x {found.size[1]}: {_price(found)}"
        return f"({width} x {height}, {looked}; in full {_price(full)})"

    def _words_of_video(self, attachment: Attachment) -> str:
        plan = self._plan(attachment)
        lasts = f"{human_seconds(plan.seconds)}, " if plan.seconds is not None else ""
        words = f"{lasts}{self._price_of_video(plan)}"
        if self.is_shrunk(attachment):
            kept = tuple(o for o in attachment.options if o[0] == "fps")
            words += f"; in full {self._price_of_video(self._plan(replace(attachment, options=kept)))}"
        return f"({words})"

    def _price_of_video(self, plan: VideoPlan) -> str:
        tokens, (height, width) = self._n_tokens(plan), plan.size
        steps = -(-plan.n_frames // FRAME_FACTOR)  # attention stays within each
        config = self.model.vision.config if tokens > LOW_TOKENS else None
        spent = steps * seconds(config, self.pace, tokens // steps) if config else None
        return f"{plan.n_frames} frames of {width} x {height}: {_price(Cost((width, height), tokens, spent))}"

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
        if bound is None and preprocessor.n_tokens(height, width) <= LOW_TOKENS:  # costs next to nothing
            return cost(preprocessor, width, height)
        return cost(preprocessor, width, height, vision.config, self.pace)


@lru_cache(maxsize=64)
def _plan(path: Path, changed: int, preprocessor: Preprocessor, options: VideoOptions) -> VideoPlan:
    return plan_video(path, preprocessor, options)


def _price(found: Cost) -> str:
    about = "" if found.seconds is None else f", about {human_seconds(found.seconds)}"
    return f"{found.tokens} tokens{about}"
