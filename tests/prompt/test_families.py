"""What each family's prompts are made of: text, control tokens, spans and their positions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.chatml import INSTRUCT_TEMPLATE

from qvl.runtime.families.qwen2_5_vl import prompt as qwen2_5_vl
from qvl.runtime.families.qwen2_vl import prompt as qwen2_vl
from qvl.runtime.families.qwen3_vl import prompt as qwen3_vl
from qvl.runtime.families.qwen_vl import prompt as qwen_vl
from qvl.runtime.prompt.chatml import ChatTemplate
from qvl.runtime.prompt.messages import VisionChunk
from qvl.runtime.prompt.positions import FlatSpan, Span, TextSpan, VisionSpan, mrope_positions
from qvl.runtime.prompt.rules import PromptRules, Vision

TEMPLATES = Path(__file__).parents[1] / "fixtures" / "templates"
CHATML = (
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
)
CONTROLS = (
    *CHATML,
    "<|video_pad|>",
    "<|box_start|>",
    "<|box_end|>",
    "<img>",
    "</img>",
    "<imgpad>",
    "<ref>",
    "</ref>",
)


class Letters:
    """A vocabulary in which every letter is a token and control tokens are negative."""

    controls = CONTROLS

    def tokenize(self, text: str) -> list[int]:
        return list(map(ord, text))

    def control(self, name: str) -> int:
        return -1 - CONTROLS.index(name)


def written(rules: PromptRules, messages: Any, template: str | None = None, **options: Any) -> str:
    """The prompt as text; [N] for N embeddings; what a user typed of control tokens is in no way marked."""

    def place(chunk: VisionChunk) -> Sequence[str | Span]:
        seen = Vision(chunk.kind, (2, 2, 3), (0.0, 0.5, 1.0, 1.5)) if chunk.kind == "video" else None
        return rules.layout(seen or Vision("image", (1, 2, 2)))

    text = ""
    for unit in ChatTemplate(Letters(), template, rules).units(messages, place, **options):
        if isinstance(unit, int):
            text += chr(unit) if unit >= 0 else CONTROLS[-1 - unit]
        else:
            text += f"[{unit.n_tokens}]"
    return text


def picture(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", "image": "a"}, {"type": "text", "text": text}]}]


VIDEO = [{"role": "user", "content": [{"type": "video", "video": "a"}, {"type": "text", "text": "x"}]}]


def test_qwen2_vl() -> None:
    rules = qwen2_vl.rules({}, {})
    assert written(rules, picture("What?")) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|>[4]<|vision_end|>What?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "<|vision_start|>[12]<|vision_end|>" in written(rules, VIDEO)


def test_qwen3_vl_writes_the_time_before_every_frame_pair() -> None:
    template = (TEMPLATES / "Qwen3-VL-Embedding-8B.jinja").read_text()
    pair = "<|vision_start|>[6]<|vision_end|>"
    for source in (template, None):
        assert f"user\n<0.2 seconds>{pair}<1.2 seconds>{pair}x<" in written(
            qwen3_vl.rules({}, {}), VIDEO, source
        )
    assert written(qwen3_vl.rules({}, {}), picture("x")).startswith("<|im_start|>user\n")  # no system prompt


def test_qwen_vl_chat_numbers_pictures_over_the_conversation() -> None:
    rules = qwen_vl.rules({"qvl.chat_format": "chatml"}, {})
    said = {"role": "assistant", "content": "A <ref>cup</ref>"}
    assert written(rules, [*picture("What?"), said, *picture("And?")]) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nPicture 1: <img>[4]</img>\nWhat?<|im_end|>\n"
        "<|im_start|>assistant\nA <ref>cup</ref><|im_end|>\n"
        "<|im_start|>user\nPicture 2: <img>[4]</img>\nAnd?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_qwen_vl_base_continues_text() -> None:
    rules = qwen_vl.rules({"qvl.chat_format": "raw"}, {})
    assert written(rules, picture(qwen_vl.CAPTION)) == "<img>[4]</img>Describe the image in English:"
    assert rules.caption == qwen_vl.CAPTION
    assert qwen_vl.layout(Vision("image", (1, 16, 16))) == [FlatSpan(256)]


def test_a_picture_token_that_is_typed_stays_text() -> None:
    typed = "<img></img><|image_pad|>"
    assert written(qwen_vl.rules({}, {}), picture(typed)).count("[4]") == 1


@pytest.mark.parametrize(
    ("fps", "rate", "step"), [(2.0, 2, 2.0), (1.0, 2, 4.0), (2.0, 4, 4.0), (0.5, 2, 8.0), (8.0, 2, 1.0)]
)
def test_qwen2_5_vl_counts_time_in_seconds(fps: float, rate: float, step: float) -> None:
    rules = qwen2_5_vl.rules({}, {"qvl.vision.tokens_per_second": rate})
    assert rules.layout(Vision("video", (3, 2, 2), fps=fps)) == [VisionSpan(3, 2, 2, step)]
    assert rules.layout(Vision("image", (1, 2, 2))) == [VisionSpan(1, 2, 2)]


_STEPS = st.floats(0.0625, 25, width=32)


@settings(max_examples=1000, deadline=None)
@given(
    st.lists(
        st.integers(1, 30).map(TextSpan)
        | st.builds(
            VisionSpan, st.integers(1, 20), st.integers(1, 5), st.integers(1, 5), _STEPS
        ),
        min_size=1, max_size=6,
    )
)  # fmt: skip
def test_time_steps_against_the_training_code_restated(spans: list[Span]) -> None:
    """As `get_rope_index_25` of qwen-vl-finetune: float32 times cut to whole numbers; the largest + 1."""
    expected: list[tuple[int, int, int]] = []
    for span in spans:
        begin = max((max(p) for p in expected), default=-1) + 1
        if isinstance(span, TextSpan):
            expected += [(begin + i,) * 3 for i in range(span.n)]
            continue
        times = [int(np.float32(i) * np.float32(span.time_step)) for i in range(span.t)]
        expected += [
            (begin + t, begin + h, begin + w) for t in times for h in range(span.h) for w in range(span.w)
        ]
    positions, following = mrope_positions(spans)
    assert positions.T.tolist() == [list(p) for p in expected]
    assert following == max(max(p) for p in expected) + 1


TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"é": {}}}}}
]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"é": "<|im_end|> & 'x'"}}}
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "text": ([{"role": "user", "content": "Hi"}], {}),
    "system": ([{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}], {}),
    "empty system": ([{"role": "system", "content": ""}, {"role": "user", "content": "Hi"}], {}),
    "turns": (
        [
            {"role": "user", "content": " a\n"},
            {"role": "assistant", "content": "\nb "},
            {"role": "user", "content": "c"},
        ],
        {},
    ),
    "thought": (
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb"},
            {"role": "user", "content": "c"},
        ],
        {},
    ),
    "tools": ([{"role": "user", "content": "Use it"}], {"tools": TOOLS}),
    "tool calls": (
        [
            {"role": "user", "content": "Use it"},
            {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
            {"role": "tool", "content": "42"},
            {"role": "tool", "content": [{"type": "text", "text": "43"}]},
            {"role": "user", "content": "and?"},
        ],
        {"tools": TOOLS},
    ),
    "thinking": ([{"role": "user", "content": "a"}], {"thinking": True}),
    "not thinking": ([{"role": "user", "content": "a"}], {"thinking": False}),
    "pictures": (
        [{"role": "user", "content": [*picture("?")[0]["content"], {"type": "image", "image": ""}]}],
        {"number_images": True},
    ),
}  # fmt: skip


@pytest.mark.parity
@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("template", ["Qwen2-VL-Instruct", "Qwen3-VL-Embedding-8B", "Qwen3.5-4B"])
def test_templates_render_as_transformers_renders_them(name: str, template: str) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    messages, options = CONVERSATIONS[name]
    if template == "Qwen2-VL-Instruct":
        if name.startswith("tool"):
            pytest.skip("it takes no tools")
        source = INSTRUCT_TEMPLATE
    else:
        source = (TEMPLATES / f"{template}.jinja").read_text()
    variables = {"add_vision_id": options.get("number_images", False)}
    if "thinking" in options:
        variables["enable_thinking"] = options["thinking"]
    [expected], _ = utils.render_jinja_template(
        [messages], tools=options.get("tools"), chat_template=source, add_generation_prompt=True, **variables
    )
    rules = PromptRules(layout=lambda vision: ["<|image_pad|>"])
    assert written(rules, messages, source, **options) == expected
