"""`POST /v1/chat/completions`."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from qvl.runtime.engine.reply import TokenLogprob
from qvl.runtime.model import Model
from qvl.runtime.serve.documented import ERRORS
from qvl.runtime.serve.errors import Json
from qvl.runtime.serve.generation import Delta, Generation, Progress
from qvl.runtime.serve.schemas import ChatRequest
from qvl.runtime.serve.state import State
from qvl.runtime.serve.stream import Events, collect, event

router = APIRouter()


@router.post("/v1/chat/completions", responses=ERRORS, tags=["OpenAI"])
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation with pictures and videos.

    Beside OpenAI's fields, each choice carries `boxes` (in pixels of the picture as it was sent: `label`,
    `box`, `quad` or `point`, `picture` counted from 1, and the `text` that it was read from), and `raw` where
    the model wrote other text than is shown. `return_progress` streams what a request waits for.
    """
    state: State = request.app.state.qvl
    generation = Generation(state, body)
    await generation.begin()
    head = {
        "id": f"chatcmpl-{uuid.uuid4().hex[:24]}",
        "created": int(time.time()),
        "model": state.name,
    }
    if body.stream:
        return Events(_stream(generation, head), "chat", state)
    deltas = await collect(generation, request, "chat", state)
    model, _ = state.ready()
    choices = [_choice(i, [d for d in deltas if d.index == i], body, model) for i in range(body.n)]
    usage = {"usage": generation.usage, "timings": generation.timings}
    return Json({**head, "object": "chat.completion", "choices": choices, **usage})


def _choice(index: int, deltas: list[Delta], body: ChatRequest, model: Model) -> dict[str, Any]:
    text = "".join(delta.text for delta in deltas)
    calls = [call.json() for delta in deltas for call in delta.calls]
    message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None}
    if calls:
        message["tool_calls"] = calls
    choice = {
        "index": index,
        "message": message,
        "finish_reason": deltas[-1].finish,
        "boxes": [box for delta in deltas for box in delta.boxes],
    }
    if deltas[-1].raw is not None:
        choice["raw"] = deltas[-1].raw
    logprobs = [each for delta in deltas for each in delta.logprobs]
    choice["logprobs"] = _logprobs(logprobs, model) if body.logprobs else None
    return choice


async def _stream(generation: Generation, head: dict[str, Any]) -> AsyncIterator[str]:
    body = generation.body
    model, _ = generation.state.ready()
    chunk = {**head, "object": "chat.completion.chunk"}
    for i in range(body.n):
        yield event({**chunk, "choices": [_part(i, {"role": "assistant", "content": ""}, None)]})
    n_calls = [0] * body.n
    async for found in generation:
        if isinstance(found, Progress):
            if body.return_progress:
                yield event({**chunk, "choices": [], "progress": found.json()})
            continue
        delta: dict[str, Any] = {"content": found.text} if found.text else {}
        if found.calls:
            start = n_calls[found.index]
            delta["tool_calls"] = [call.json(start + k) for k, call in enumerate(found.calls)]
            n_calls[found.index] += len(found.calls)
        if not (delta or found.boxes or found.finish or found.logprobs):
            continue
        part = _part(found.index, delta, found.finish)
        if found.boxes:
            part["boxes"] = list(found.boxes)
        if found.raw is not None:
            part["raw"] = found.raw
        if body.logprobs:
            part["logprobs"] = _logprobs(found.logprobs, model)
        yield event({**chunk, "choices": [part]})
    if body.stream_options is not None and body.stream_options.include_usage:
        cost = {"usage": generation.usage, "timings": generation.timings}
        yield event({**chunk, "choices": [], **cost})
    yield "data: [DONE]\n\n"


def _part(index: int, delta: dict[str, Any], finish: str | None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "finish_reason": finish, "logprobs": None}


def _logprobs(found: list[TokenLogprob] | tuple[TokenLogprob, ...], model: Model) -> dict[str, Any]:
    def one(token: int, logprob: float) -> dict[str, Any]:
        piece = model.text.vocab.piece(token)
        return {"token": piece.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(piece)}

    content = [
        {**one(each.token, each.logprob), "top_logprobs": [one(*other) for other in each.top]}
        for each in found
    ]
    return {"content": content, "refusal": None}
