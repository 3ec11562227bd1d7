"""`POST /v1/responses`: text and pictures, whole or as events."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from itertools import count
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from qvl.runtime.serve.documented import ERRORS
from qvl.runtime.serve.errors import Json
from qvl.runtime.serve.generation import Delta, Generation
from qvl.runtime.serve.schemas import (
    ChatMessage,
    ChatRequest,
    InputItem,
    InputPart,
    JsonSchema,
    Part,
    ResponseFormat,
    ResponsesRequest,
    Url,
)
from qvl.runtime.serve.state import State
from qvl.runtime.serve.stream import Events, collect, event

router = APIRouter()


@router.post("/v1/responses", responses=ERRORS, tags=["OpenAI"])
async def responses(body: ResponsesRequest, request: Request) -> Response:
    """Answer one input. Nothing is stored: send the whole conversation, not `previous_response_id`."""
    state: State = request.app.state.qvl
    generation = Generation(state, _as_chat(body))
    await generation.begin()
    head = {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "model": state.name,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "parallel_tool_calls": False,
        "tool_choice": "none",
        "tools": [],
        "temperature": body.temperature,
        "top_p": body.top_p,
        "metadata": {},
        "error": None,
        "incomplete_details": None,
    }
    message = f"msg_{uuid.uuid4().hex}"
    if body.stream:
        return Events(_stream(generation, head, message), "responses", state)
    deltas = await collect(generation, request, "responses", state)
    return Json(_finished(head, message, deltas, generation))


def _as_chat(body: ResponsesRequest) -> ChatRequest:
    messages = [] if body.instructions is None else [ChatMessage(role="system", content=body.instructions)]
    if isinstance(body.input, str):
        messages.append(ChatMessage(role="user", content=body.input))
    else:
        messages += [_message(item) for item in body.input]
    shared = ("model", "temperature", "top_p", "top_k", "min_p", "repeat_penalty", "presence_penalty", "seed")
    return ChatRequest(
        messages=messages,
        max_tokens=body.max_output_tokens,
        response_format=_format(body),
        min_pixels=body.min_pixels,
        max_pixels=body.max_pixels,
        **{name: getattr(body, name) for name in shared},
    )


def _format(body: ResponsesRequest) -> ResponseFormat | None:
    form = body.text.format if body.text else None
    if form is None:
        return None
    schema = JsonSchema(schema=form.schema_) if form.type == "json_schema" else None
    return ResponseFormat(type=form.type, json_schema=schema)


def _message(item: InputItem) -> ChatMessage:
    if isinstance(item.content, str):
        return ChatMessage(role=item.role, content=item.content)
    return ChatMessage(role=item.role, content=[_part(part) for part in item.content])


def _part(part: InputPart) -> Part:
    if part.type == "input_image":
        url = None if part.image_url is None else Url(url=part.image_url, detail=part.detail)
        return Part(type="image_url", image_url=url)
    return Part(type="text", text=part.text or "")


def _item(message: str, text: str, status: str) -> dict[str, Any]:
    content = [{"type": "output_text", "text": text, "annotations": []}] if status == "completed" else []
    return {"id": message, "type": "message", "role": "assistant", "status": status, "content": content}


def _finished(
    head: dict[str, Any], message: str, deltas: list[Delta], generation: Generation
) -> dict[str, Any]:
    text = "".join(delta.text for delta in deltas)
    cut = bool(deltas) and deltas[-1].finish == "length"
    usage = generation.usage
    return {
        **head,
        "status": "incomplete" if cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": [_item(message, text, "completed")],
        "boxes": [box for delta in deltas for box in delta.boxes],
        "usage": {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        },
    }


async def _stream(generation: Generation, head: dict[str, Any], message: str) -> AsyncIterator[str]:
    numbers = count()

    def told(kind: str, **fields: Any) -> str:
        return event({"type": kind, "sequence_number": next(numbers), **fields}, kind)

    started = {**head, "status": "in_progress", "output": [], "usage": None}
    place = {"item_id": message, "output_index": 0, "content_index": 0}
    empty = {"type": "output_text", "text": "", "annotations": []}
    yield told("response.created", response=started)
    yield told("response.in_progress", response=started)
    yield told("response.output_item.added", output_index=0, item=_item(message, "", "in_progress"))
    yield told("response.content_part.added", **place, part=empty)
    deltas: list[Delta] = []
    async for found in generation:
        if isinstance(found, Delta):
            deltas.append(found)
            if found.text:
                yield told("response.output_text.delta", **place, delta=found.text, logprobs=[])
    text = "".join(delta.text for delta in deltas)
    yield told("response.output_text.done", **place, text=text, logprobs=[])
    yield told("response.content_part.done", **place, part={**empty, "text": text})
    yield told("response.output_item.done", output_index=0, item=_item(message, text, "completed"))
    response = _finished(head, message, deltas, generation)
    kind = "response.incomplete" if response["status"] == "incomplete" else "response.completed"
    yield told(kind, response=response)
