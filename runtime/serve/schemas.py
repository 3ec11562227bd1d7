"""The bodies of requests, checked by pydantic; field names and meanings are OpenAI's, extras are marked."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Probability = Annotated[float, Field(ge=0, le=1)]
Pixels = Annotated[int, Field(ge=1, le=1 << 30)]


class Lenient(BaseModel):
    """Fields that are not known are ignored, since clients send many."""

    model_config = ConfigDict(extra="ignore")


class Url(Lenient):
    """A picture or video: a data: URL, or a file:// address below the server's media folder."""

    url: str
    detail: Literal["low", "auto", "high"] | None = None


class Video(Lenient):
    """A video as base64 (extra)."""

    data: str
    format: str = "mp4"


class Part(Lenient):
    """A part of a message."""

    type: Literal["text", "image_url", "video_url", "input_video", "refusal"]
    text: str | None = None
    image_url: Url | str | None = None
    video_url: Url | str | None = None
    input_video: Video | None = None
    min_pixels: Pixels | None = None
    max_pixels: Pixels | None = None
    fps: Annotated[float, Field(gt=0, le=240)] | None = None


class FunctionCall(Lenient):
    """The function that a tool call names, with its arguments as JSON text."""

    name: str
    arguments: str = "{}"


class ToolCall(Lenient):
    """A tool call that the model made before."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Lenient):
    """A message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class Function(Lenient):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: Annotated[str, Field(min_length=1, max_length=128)]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Lenient):
    """A tool: functions only."""

    type: Literal["function"]
    function: Function


class NamedTool(Lenient):
    """One tool that must be called."""

    type: Literal["function"]
    function: FunctionCall


class JsonSchema(Lenient):
    """A JSON schema that the reply must fit."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True, protected_namespaces=())
    name: str = "reply"
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class ResponseFormat(Lenient):
    """The form of the reply."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(Lenient):
    """Extras of a stream beside the reply."""

    include_usage: bool = False


class Sampled(Lenient):
    """Sampling parameters; the model's own stand in for those left out."""

    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=0, le=1 << 30)] | None = None
    min_p: Probability | None = None
    repeat_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=0, lt=0xFFFFFFFF)] | None = None
    min_pixels: Pixels | None = None
    max_pixels: Pixels | None = None


class ChatRequest(Sampled):
    """`POST /v1/chat/completions`."""

    model: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] = 1
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    return_progress: bool = False


class InputPart(Lenient):
    """A part of an item of `/v1/responses`."""

    type: Literal["input_text", "output_text", "input_image"]
    text: str | None = None
    image_url: str | None = None
    detail: Literal["low", "auto", "high"] | None = None


class InputItem(Lenient):
    """A message of `/v1/responses`."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InputPart]


class TextFormat(Lenient):
    """The form of the reply in `/v1/responses`."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True, protected_namespaces=())
    type: Literal["text", "json_object", "json_schema"] = "text"
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class TextOptions(Lenient):
    """`text` of `/v1/responses`."""

    format: TextFormat | None = None


class ResponsesRequest(Sampled):
    """`POST /v1/responses`."""

    model: str | None = None
    input: str | Annotated[list[InputItem], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    stream: bool = False
    text: TextOptions | None = None


class CostRequest(Lenient):
    """`POST /v1/vision/cost`: a picture's or video's size in pixels (extra)."""

    kind: Literal["image", "video"] = "image"
    width: Annotated[int, Field(ge=1, le=1 << 20)]
    height: Annotated[int, Field(ge=1, le=1 << 20)]
    duration: Annotated[float, Field(ge=0, le=1e6)] | None = None
    max_pixels: Pixels | None = None
