"""Tool calls: told apart from text, and forced where the client asks for one."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.server import Running, running

from qvl.runtime.prompt.chatml import ChatTemplate
from qvl.runtime.serve.tools import Call, ToolParser

# as Qwen's templates with tools do, in short
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    "</tools><|im_end|>\n{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% endif %}"
    "{% for call in message.tool_calls or [] %}"
    "<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"unit": {"enum": ["C", "F"]}},
            "required": ["unit"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def tooled() -> Iterator[Running]:
    with running(n_ctx=1024, parallel=2) as found:
        model = found.state.model
        assert model is not None
        model.template = ChatTemplate(model.text.vocab, TEMPLATE, model.template.rules)
        yield found


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_that_must_be_made_is_made(tooled: Running, choice: Any, stream: bool) -> None:
    client = openai.OpenAI(base_url=f"{tooled.url}/v1", api_key="none", max_retries=0)
    question: Any = {"role": "user", "content": "What is the weather?"}
    options: Any = {"model": "nano", "tools": [WEATHER], "tool_choice": choice, "temperature": 0}
    if stream:
        replies = client.chat.completions.create(messages=[question], stream=True, **options)
        chunks = [chunk.choices[0] for chunk in replies]
        (call,) = [call for c in chunks for call in c.delta.tool_calls or []]
        reasons = [c.finish_reason for c in chunks if c.finish_reason]
        assert reasons == ["tool_calls"]
    else:
        reply = client.chat.completions.create(messages=[question], **options).choices[0]
        assert reply.finish_reason == "tool_calls"
        (call,) = reply.message.tool_calls
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["unit"] in ("C", "F")
    if not stream:  # the answer goes back, and the conversation goes on
        told: Any = {"role": "tool", "tool_call_id": call.id, "content": "20"}
        said: Any = {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]}
        next_turn = client.chat.completions.create(
            model="nano", messages=[question, said, told], tools=[WEATHER], max_tokens=2
        )
        assert next_turn.usage is not None and next_turn.usage.prompt_tokens > 40


def test_a_template_without_tools_refuses_them(client: openai.OpenAI) -> None:
    question: Any = {"role": "user", "content": "x"}
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(model="nano", messages=[question], tools=[WEATHER])


CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "</tool"}}\n</tool_call>'


@given(
    st.lists(st.sampled_from(["a ", "<tool", "<tool_call>", "</tool_call>", "\n", CALL, "<"]), max_size=6),
    st.lists(st.integers(0, 200), max_size=5),
)
def test_pieces_cut_anywhere_give_the_same_parts(parts: list[str], cuts: list[int]) -> None:
    text = "".join(parts)

    def read(pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
        parser = ToolParser()
        found = [part for piece in pieces for part in parser.feed(piece)] + parser.finish()
        calls = [(part.name, part.arguments) for part in found if isinstance(part, Call)]
        return "".join(part for part in found if isinstance(part, str)), calls

    edges = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    whole, cut = read([text]), read(pieces)
    assert cut[1] == whole[1]
    assert cut[0].split() == whole[0].split()
    assert len(whole[1]) <= text.count("<tool_call>")
