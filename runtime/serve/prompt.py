"""A checked request to a request of the engine: messages, pictures, sampling, grammar."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from qvl.runtime.detail.bounds import Detail
from qvl.runtime.engine.request import Request
from qvl.runtime.engine.units import VisionUnit, n_cells, n_vision_cells
from qvl.runtime.errors import InputError
from qvl.runtime.grammar.schema import schema_to_grammar
from qvl.runtime.llama.sampler import Sampler
from qvl.runtime.model import Model
from qvl.runtime.serve import media
from qvl.runtime.serve.errors import ApiError
from qvl.runtime.serve.schemas import ChatMessage, ChatRequest, NamedTool, Part, ResponseFormat, Url
from qvl.runtime.serve.state import State

DEFAULT_TOKENS: Final = 1024
_ROLES: Final = {"developer": "system"}


@dataclass(frozen=True)
class Prepared:
    """A request that is ready for the engine.

    Attributes:
        question: the text of the last message, which may say which picture is meant.
        image_tokens: of the prompt.
        seeds: of each reply.
        tools: whether the reply may hold tool calls.
        uploads: files of videos, to be released at the end.
    """

    request: Request
    question: str
    image_tokens: int
    seeds: tuple[int, ...]
    tools: bool
    uploads: tuple[Path, ...] = ()


def prepare(state: State, body: ChatRequest) -> Prepared:
    """Read pictures, render the prompt, and make the samplers. Takes long; not for the event loop.

    Raises:
        ApiError, QvlError: something in the request cannot be used.
    """
    model, _ = state.ready()
    reader = _Reader(model, state, body)
    try:
        return _prepare(state, body, model, reader)
    except BaseException:
        for path in reader.uploads:
            state.uploads.release(path)
        raise


def _prepare(state: State, body: ChatRequest, model: Model, reader: _Reader) -> Prepared:
    messages = [reader.message(i, message) for i, message in enumerate(body.messages)]
    tools = _tools(body)
    units = model.template.units(messages, model.store.place, replies=state.replies.get, tools=tools)
    prompt = n_cells(units)
    most = body.max_completion_tokens or body.max_tokens or DEFAULT_TOKENS
    room = model.n_ctx - prompt
    if room < 1:
        raise ApiError(
            400,
            f"the prompt takes {prompt} tokens, the context holds {model.n_ctx}",
            code="context_length_exceeded",
            param="messages",
        )
    if body.n > state.options.parallel:
        raise ApiError(
            400, f"n is {body.n}, expected at most {state.options.parallel} on this server", param="n"
        )
    sampling = model.sampling.override(
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        min_p=body.min_p,
        repeat_penalty=body.repeat_penalty,
        presence_penalty=body.presence_penalty,
    )
    first = secrets.randbits(31) if body.seed is None else body.seed
    seeds = tuple((first + i) % 0xFFFFFFFF for i in range(body.n))
    grammar = _grammar(body)
    samplers: list[Sampler] = []
    try:
        for seed in seeds:
            samplers.append(Sampler(model.text.vocab, replace(sampling, seed=seed), grammar))
        stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        if not all(stop):
            raise ApiError(400, "stop has an empty string", param="stop")
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        request = Request(units, tuple(samplers), min(most, room), stop, logprobs)
    except BaseException:
        for sampler in samplers:
            sampler.close()
        raise
    pictures = [unit for unit in units if isinstance(unit, VisionUnit)]
    return Prepared(
        request,
        reader.question,
        n_vision_cells(pictures),
        seeds,
        bool(tools),
        tuple(reader.uploads),
    )


class _Reader:
    """Messages in OpenAI's shape to those of `ChatTemplate.render`."""

    def __init__(self, model: Model, state: State, body: ChatRequest) -> None:
        self._model, self._state, self._body = model, state, body
        self._options = state.options
        self._count = 0
        self.uploads: list[Path] = []
        self.question = ""

    def message(self, i: int, message: ChatMessage) -> dict[str, Any]:
        role = _ROLES.get(message.role, message.role)
        content = message.content
        if isinstance(content, list):
            parts: Any = [self._part(f"messages.{i}.content.{j}", part) for j, part in enumerate(content)]
        else:
            parts = content or ""
        if role == "user":
            texts = [parts] if isinstance(parts, str) else [p["text"] for p in parts if p["type"] == "text"]
            self.question = "\n".join(texts)
        result: dict[str, Any] = {"role": role, "content": parts}
        if message.tool_calls:
            result["tool_calls"] = [_tool_call(i, call.model_dump()) for call in message.tool_calls]
        return result

    def _part(self, where: str, part: Part) -> dict[str, Any]:
        if part.type in ("text", "refusal"):
            return {"type": "text", "text": part.text or ""}
        self._count += 1
        if self._count > self._options.max_pictures:
            raise ApiError(400, f"over {self._options.max_pictures} pictures and videos", param=where)
        if part.type == "input_video":
            if part.input_video is None:
                raise ApiError(400, f"{where}: input_video is missing", param=where)
            return self._video(media.decode(part.input_video.data, self._options, where), part)
        given = part.image_url if part.type == "image_url" else part.video_url
        if given is None:
            raise ApiError(400, f"{where}: {part.type} is missing", param=where)
        url = Url(url=given) if isinstance(given, str) else given
        source = media.read_url(url.url, self._options, where)
        return (
            self._video(source, part) if part.type == "video_url" else self._image(source, part, url.detail)
        )

    def _video(self, source: bytes | Path, part: Part) -> dict[str, Any]:
        if isinstance(source, bytes):
            source = self._state.uploads.take(source)
            self.uploads.append(source)
        bounds = self._bounds(part)
        fps = {} if part.fps is None else {"fps": part.fps}
        return {"type": "video", "video": str(source), **bounds, **fps}

    def _image(self, source: bytes | Path, part: Part, detail: Detail | None) -> dict[str, Any]:
        bounds, own = self._bounds(part), self._model.vision.preprocessor
        if "max_pixels" not in bounds:
            most = max(self._state.max_pixels(detail or "auto"), bounds.get("min_pixels", 0))
            if most < own.max_pixels:
                bounds["max_pixels"] = most
        return {"type": "image", "image": source if isinstance(source, bytes) else str(source), **bounds}

    def _bounds(self, part: Part) -> dict[str, int]:
        preprocessor = self._model.vision.preprocessor
        low = part.min_pixels or self._body.min_pixels
        high = part.max_pixels or self._body.max_pixels
        if low is not None and low > (high or preprocessor.max_pixels):
            raise ApiError(400, f"min_pixels is {low}, over max_pixels", param="min_pixels")
        if high is not None and low is None and high < preprocessor.min_pixels:
            low = min(high, preprocessor.min_pixels)
        bounds = {"min_pixels": low, "max_pixels": high}
        return {name: value for name, value in bounds.items() if value is not None}


def _tool_call(i: int, call: dict[str, Any]) -> dict[str, Any]:
    """With its arguments as an object, as templates expect them."""
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        raise ApiError(400, f"messages.{i}.tool_calls: arguments are no JSON", param="messages") from None
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _tools(body: ChatRequest) -> list[dict[str, Any]] | None:
    if not body.tools or body.tool_choice == "none":
        return None
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools]
    if isinstance(body.tool_choice, NamedTool):
        wanted = body.tool_choice.function.name
        tools = [tool for tool in tools if tool["function"]["name"] == wanted]
        if not tools:
            raise ApiError(400, f"tool_choice names {wanted!r}, which is not in tools", param="tool_choice")
    return tools


def _grammar(body: ChatRequest) -> str | None:
    """The grammar that the reply must fit: of its JSON, or of a tool call that must be made."""
    if body.tools and (body.tool_choice == "required" or isinstance(body.tool_choice, NamedTool)):
        return _calls_grammar(_tools(body) or [])
    return format_grammar(body.response_format)


def format_grammar(form: ResponseFormat | None) -> str | None:
    """The grammar of a `response_format`.

    Raises:
        ApiError: the schema is missing. InputError: it cannot be used.
    """
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return schema_to_grammar({"type": "object"})
    if form.json_schema is None or form.json_schema.schema_ is None:
        raise ApiError(400, "response_format.json_schema.schema is missing", param="response_format")
    return schema_to_grammar(form.json_schema.schema_)


def _calls_grammar(tools: Sequence[dict[str, Any]]) -> str:
    """GBNF of one tool call: `<tool_call>`, JSON that names a tool and its arguments, `</tool_call>`."""
    one = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool["function"]["name"]},
                "arguments": tool["function"].get("parameters") or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    try:
        grammar = schema_to_grammar({"anyOf": one})
    except InputError as e:
        raise ApiError(400, f"tools: {e.message}", param="tools") from e
    renamed = re.sub(r"^root ::=", "call ::=", grammar, flags=re.MULTILINE)
    return f'root ::= "<tool_call>\\n" call "\\n</tool_call>"\n{renamed}'
