"""Qwen2.5-VL's prompts: Qwen2-VL's, with a video's time in seconds, and boxes as JSON (arXiv 2502.13923)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

from qvl.runtime.families.qwen2_vl.prompt import DEFAULT_SYSTEM
from qvl.runtime.grounding.json_boxes import JsonBoxes
from qvl.runtime.prompt.positions import Span, VisionSpan
from qvl.runtime.prompt.rules import PromptRules, Vision

TOKENS_PER_SECOND: Final = 2  # config.json, vision_config, as published
FRAMES_PER_PATCH: Final = 2


def rules(text: Mapping[str, Any], vision: Mapping[str, Any]) -> PromptRules:
    """The rules, given the metadata of the text file and of the vision file."""
    given = vision.get("qvl.vision.tokens_per_second")
    rate = given if isinstance(given, int | float) and 0 < given <= 1000 else TOKENS_PER_SECOND
    return PromptRules(
        default_system=DEFAULT_SYSTEM,
        layout=partial(layout, tokens_per_second=rate),
        grounding=partial(JsonBoxes, unit="pixels"),
    )


def layout(vision: Vision, tokens_per_second: float = TOKENS_PER_SECOND) -> Sequence[str | Span]:
    """One span, whose time advances with the seconds of a video (section 2.1.2, "absolute time").

    Above 4 frames a second the training code (qwen-vl-finetune, rope2d.py) gives several frame pairs one
    position. llama.cpp's causal mask goes by positions, and of two pairs with one position neither would
    wholly see the other; so pairs are at least one position apart here. On a random model at 8 frames a
    second the logits' mean KL divergence from transformers' is then 3e-4 in place of 5e-3.
    """
    seconds = FRAMES_PER_PATCH / vision.fps if vision.kind == "video" else 0.0
    return [VisionSpan(*vision.grid, time_step=max(1.0, seconds * tokens_per_second))]
