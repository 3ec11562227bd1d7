"""Qwen3-VL's prompts: the time as text before every frame pair, boxes as JSON (arXiv 2511.21631)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final

from qvl.runtime.grounding.json_boxes import JsonBoxes
from qvl.runtime.prompt.positions import Span, VisionSpan
from qvl.runtime.prompt.rules import PromptRules, Vision

FRAMES_PER_PATCH: Final = 2


def rules(text: Mapping[str, Any], vision: Mapping[str, Any]) -> PromptRules:
    """The rules, given the metadata of the text file and of the vision file."""
    return PromptRules(
        # transformers 4.57 replaces the outer tags too, and the model was trained with it; 5 leaves them
        placeholders=(("image", "<|image_pad|>"), ("video", "<|vision_start|><|video_pad|><|vision_end|>")),
        layout=layout,
        grounding=partial(JsonBoxes, unit="thousandths"),
    )


def layout(vision: Vision) -> Sequence[str | Span]:
    """A picture as one span; a video as a span for each frame pair, after the mean of the two frames' times.

    Source: transformers, models/qwen3_vl/processing_qwen3_vl.py, `replace_video_token` and
    `_calculate_timestamps`.
    """
    t, h, w = vision.grid
    return [VisionSpan(t, h, w)] if vision.kind == "image" else list(_frames(t, h, w, vision.seconds))


def _frames(t: int, h: int, w: int, seconds: Sequence[float]) -> Iterator[str | Span]:
    times = [*seconds, *seconds[-1:]]  # an odd frame is repeated
    for i in range(t):
        first, last = times[FRAMES_PER_PATCH * i], times[FRAMES_PER_PATCH * i + 1]
        yield f"<{(first + last) / 2:.1f} seconds><|vision_start|>"
        yield VisionSpan(1, h, w)
        yield "<|vision_end|>"
