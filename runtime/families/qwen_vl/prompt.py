"""Qwen-VL's prompts (arXiv 2308.12966): numbered pictures, ChatML for Chat, plain text for the base.

    Picture 1: <img>[picture]</img>
    Describe the image in English:

Published code: `from_list_format` of the tokenizer. The base model continues text: it captions after
"Describe the image in English:", answers after "{question} Answer:", grounds after "<ref>{name}</ref><box>".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

from qvl.runtime.grounding.tags import QWEN, GroundingParser
from qvl.runtime.prompt.positions import FlatSpan, Span
from qvl.runtime.prompt.rules import PromptRules, Vision

CAPTION: Final = "Describe the image in English:"
TRAINED: Final = 2048  # config.json, seq_length; dynamic NTK and log-n scaling beyond are not in llama.cpp
_CONTENT: Final = (
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}{% set images.n = images.n + 1 %}"
    "{% if numbered %}Picture {{ images.n }}: {% endif %}<img><imgpad></img>{{ '\\n' if numbered }}"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
)
_CHAT: Final = (
    "{% set numbered = true %}{% set images = namespace(n=0) %}{% for message in messages %}"
    "{% if loop.first and message.role != 'system' %}"
    "<|im_start|>system\n{{ default_system }}<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message.role }}\n"
    + _CONTENT
    + "{% if not loop.last or add_generation_prompt %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_BASE: Final = (
    "{% set numbered = add_vision_id %}{% set images = namespace(n=0) %}"
    "{% for message in messages %}" + _CONTENT + "{% endfor %}"
)


def rules(text: Mapping[str, Any], vision: Mapping[str, Any]) -> PromptRules:
    """The rules, given the metadata of the text file and of the vision file."""
    raw = text.get("qvl.chat_format") == "raw"
    return PromptRules(
        template=_BASE if raw else _CHAT,
        default_system="You are a helpful assistant.",
        placeholders=(("image", "<imgpad>"),),
        layout=layout,
        markers=QWEN.all,
        grounding=partial(GroundingParser, tags=QWEN),
        caption=CAPTION if raw else None,
        n_trained=TRAINED,
    )


def layout(vision: Vision) -> Sequence[str | Span]:
    """A picture's tokens, one position each."""
    t, h, w = vision.grid
    return [FlatSpan(t * h * w)]
