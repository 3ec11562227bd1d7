"""Rules of a family's prompts: the layout of pictures and videos, and the tokens that text may hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

from qvl.runtime.grounding.box import Choose, Parser, Resized, Size
from qvl.runtime.grounding.tags import QWEN2, GroundingParser
from qvl.runtime.prompt.messages import VisionKind
from qvl.runtime.prompt.positions import Span, VisionSpan
from qvl.runtime.vision.grid import Grid
from qvl.runtime.vision.size import PictureInfo

CHATML: Final = (
    "{% set images = namespace(n=0) %}{% set videos = namespace(n=0) %}{% for message in messages %}"
    "{% if loop.first and message.role != 'system' and default_system %}"
    "<|im_start|>system\n{{ default_system }}<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}{% set images.n = images.n + 1 %}"
    "{% if add_vision_id %}Picture {{ images.n }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'video' %}{% set videos.n = videos.n + 1 %}"
    "{% if add_vision_id %}Video {{ videos.n }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Vision:
    """Properties of a picture or video on which a prompt depends.

    Attributes:
        grid: (frame pairs, rows, columns) of tokens.
        seconds: time of each frame of a video in the video; empty for pictures.
        fps: frames that were taken of each second of a video.
        picture: sizes and name of a picture, where they are known.
    """

    kind: VisionKind
    grid: Grid
    seconds: tuple[float, ...] = ()
    fps: float = 2.0
    picture: PictureInfo | None = None


class ParserFactory(Protocol):
    """Makes a parser of replies."""

    def __call__(
        self, size: Size | None = None, choose: Choose | None = None, resized: Resized | None = None
    ) -> Parser:
        """The parser of one reply.

        Args:
            size: (width, height) in pixels of the picture as shown.
            choose: for several pictures, which one a box is in.
            resized: the size in which the model sees a picture of a size.
        """


Layout: TypeAlias = Callable[[Vision], Sequence[str | Span]]
"""The layout of a picture or video in a prompt: text in which control tokens are written by name, and
spans, which take the embeddings' rows in order."""


def one_span(vision: Vision) -> Sequence[str | Span]:
    """All tokens of a picture or video as one span."""
    return [VisionSpan(*vision.grid)]


@dataclass(frozen=True)
class PromptRules:
    """The rules of a family.

    Attributes:
        template: Jinja, for files without a chat template of their own or with one that has no roles.
        default_system: what that template puts into a conversation without a system prompt; None for nothing.
        placeholders: by kind, what the template writes for a picture or video, which the layout replaces.
        layout: see `Layout`.
        markers: control tokens that stay tokens in everybody's text.
        grounding: makes the parser for boxes in replies.
        caption: the words that ask for a caption, where the model has learned them as such.
        n_trained: tokens up to which the decoder computes what the published code does; None for no bound.
    """

    template: str = CHATML
    default_system: str | None = None
    placeholders: tuple[tuple[VisionKind, str], ...] = (
        ("image", "<|image_pad|>"),
        ("video", "<|video_pad|>"),
    )
    layout: Layout = one_span
    markers: tuple[str, ...] = QWEN2.all
    grounding: ParserFactory = GroundingParser
    caption: str | None = None
    n_trained: int | None = None
