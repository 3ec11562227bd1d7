"""The API through OpenAI's own client."""

from __future__ import annotations

import base64
import io
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx2 as httpx
import numpy as np
import openai
import pytest
from PIL import Image
from support.server import SAMPLES, Running, asked, data_url, picture, running

from qvl.convert import Converted
from qvl.runtime.detail.cost import Throughput
from qvl.runtime.vision.video import load_video

STAR = "A small red star at the top."
BOX = [94, 12, 126, 47]  # of the red star in one.png, as models/samples/answers.json has it


def ask(client: openai.OpenAI, *messages: Any, **options: Any) -> Any:
    return client.chat.completions.create(model="nano", messages=list(messages), temperature=0, **options)


def test_a_picture_is_described(client: openai.OpenAI) -> None:
    reply = ask(client, asked("Describe this image.", "one.png"))
    assert reply.choices[0].message.content == STAR
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.usage.prompt_tokens_details.image_tokens == 35


def test_a_stream_gives_the_same_text_and_its_usage(client: openai.OpenAI) -> None:
    chunks = list(
        ask(client, asked("Describe this image.", "one.png"), stream=True,
            stream_options={"include_usage": True})
    )  # fmt: skip
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == STAR
    assert [c.usage is not None for c in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].usage.completion_tokens > 0


@pytest.mark.parametrize("stream", [False, True])
def test_boxes_are_in_pixels_of_the_picture_as_sent(client: openai.OpenAI, stream: bool) -> None:
    reply = ask(client, asked("Find the red star.", "one.png"), stream=stream)
    if stream:
        found = [
            box
            for chunk in reply
            for choice in chunk.choices
            for box in (choice.model_extra or {}).get("boxes", [])
        ]
    else:
        found = reply.choices[0].boxes
        assert reply.choices[0].raw.startswith("<|object_ref_start|>")
    assert [(box["label"], box["picture"]) for box in found] == [("red star", 1)]
    assert max(abs(a - b) for a, b in zip(found[0]["box"], BOX, strict=True)) <= 8


def test_several_pictures_and_detail(client: openai.OpenAI) -> None:
    low = {"type": "image_url", "image_url": {"url": data_url("wide.png"), "detail": "low"}}
    message = {"role": "user", "content": [picture("one.png"), low, {"type": "text", "text": "Describe."}]}
    reply = ask(client, message, max_tokens=4)
    assert reply.usage.prompt_tokens_details.image_tokens > 35
    smaller = ask(
        client, asked("Describe this image.", "one.png"), max_tokens=2, extra_body={"max_pixels": 10000}
    )
    assert smaller.usage.prompt_tokens_details.image_tokens < 35


def test_detail_bounds_a_large_picture(tiny_model: Converted) -> None:
    data = io.BytesIO()
    Image.new("RGB", (1120, 1120), "teal").save(data, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    text = {"type": "text", "text": "x"}
    with running(n_ctx=4096, path=tiny_model.text) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        costs = server.state.costs
        assert costs is not None

        def tokens(**detail: str) -> int:
            image = {"type": "image_url", "image_url": {"url": url, **detail}}
            reply = ask(client, {"role": "user", "content": [image, text]}, max_tokens=1)
            return int(reply.usage.prompt_tokens_details.image_tokens)

        costs.throughput = Throughput(4096, encode_seconds=0.01, token_seconds=0.0148)  # 676 tokens in 10 s
        auto = tokens()
        assert auto == 22 * 22 and auto == tokens(detail="auto")  # the largest square below the step of 512
        assert tokens(detail="low") == 16 * 16 and tokens(detail="high") == 40 * 40
        costs.throughput = replace(costs.throughput, token_seconds=0.001)
        assert tokens() == auto  # a picture keeps its size, and with it what is cached of it


def test_a_video_as_data(client: openai.OpenAI) -> None:
    video = {"type": "video_url", "video_url": {"url": data_url("order.avi", "video/x-msvideo")}}
    message = {"role": "user", "content": [video, {"type": "text", "text": "Describe this video."}]}
    assert len(ask(client, message).choices[0].message.content) > 10


def test_a_second_turn_finds_the_first_cached(client: openai.OpenAI) -> None:
    first = asked("Describe this image.", "tall.png")
    reply = ask(client, first)
    said = {"role": "assistant", "content": reply.choices[0].message.content}
    turn = ask(client, first, said, {"role": "user", "content": "What color is the cross?"})
    known = reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert turn.usage.prompt_tokens_details.cached_tokens >= known


def test_n_seed_and_logprobs(client: openai.OpenAI) -> None:
    def texts(seed: int) -> list[str]:
        messages: Any = [asked("Describe this image.", "one.png")]
        reply = client.chat.completions.create(
            model="nano", messages=messages, n=3, seed=seed, temperature=1.5, max_tokens=12
        )
        return [choice.message.content for choice in reply.choices]

    texts(7)  # the first time the prompt is read, later it is in the cache, which rounds otherwise
    assert texts(7) == texts(7)
    reply = ask(client, asked("Describe this image.", "one.png"), logprobs=True, top_logprobs=3)
    content = reply.choices[0].logprobs.content
    assert b"".join(bytes(each.bytes) for each in content).decode() == STAR
    for each in content:
        assert len(each.top_logprobs) == 3
        assert each.logprob == pytest.approx(each.top_logprobs[0].logprob)  # greedy takes the likeliest


def test_stop_and_length(client: openai.OpenAI) -> None:
    reply = ask(client, asked("Describe this image.", "one.png"), stop=[" red"])
    assert reply.choices[0].message.content == "A small" and reply.choices[0].finish_reason == "stop"
    short = ask(client, asked("Describe this image.", "one.png"), max_completion_tokens=2)
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 2


def test_replies_in_json(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"color": {"enum": ["red", "blue"]}},
        "required": ["color"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "color", "schema": schema}}
    reply = ask(client, asked("What color is the star?", "one.png"), response_format=form)
    assert json.loads(reply.choices[0].message.content)["color"] in ("red", "blue")
    free = ask(client, asked("Describe.", "one.png"), response_format={"type": "json_object"}, max_tokens=64)
    if free.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(free.choices[0].message.content), dict)


def test_responses(client: openai.OpenAI) -> None:
    content = [
        {"type": "input_image", "image_url": data_url("one.png")},
        {"type": "input_text", "text": "Describe this image."},
    ]
    given: Any = [{"role": "user", "content": content}]
    reply = client.responses.create(model="nano", input=given, temperature=0)
    assert reply.output_text == STAR and reply.status == "completed"
    assert reply.usage is not None and reply.usage.output_tokens > 0
    with client.responses.stream(model="nano", input=given, temperature=0) as stream:
        text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
        assert text == STAR and stream.get_final_response().output_text == STAR


def test_models_and_health(client: openai.OpenAI, server: Running) -> None:
    (model,) = client.models.list().data
    assert model.id == "nano"
    assert model.architecture["input_modalities"] == ["text", "image", "video"]
    assert client.models.retrieve("nano").id == "nano"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")
    assert httpx.get(f"{server.url}/health", timeout=60).json() == {"status": "ok"}
    assert "qvl_tokens_total" in httpx.get(f"{server.url}/metrics", timeout=60).text
    assert "swagger" in httpx.get(f"{server.url}/docs", timeout=60).text


def test_eight_clients_get_what_one_gets(client: openai.OpenAI) -> None:
    names = ["one.png", "wide.png", "tall.png", "number.png"] * 2
    alone = {
        name: ask(client, asked("Describe this image.", name)).choices[0].message.content
        for name in set(names)
    }
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda name: ask(client, asked("Describe this image.", name)), names))
    assert [r.choices[0].message.content for r in replies] == [alone[name] for name in names]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_slot(server: Running, stream: bool) -> None:
    server.pause = 0.05
    worker = server.state.worker
    assert worker is not None
    body = {"messages": [asked("Describe this image.", "one.png")], "stream": stream, "max_tokens": 500}
    # a reply in JSON of a thousand numbers: long, whatever the model thinks of it
    schema = {"type": "array", "items": {"type": "integer"}, "minItems": 1000}
    body["response_format"] = {"type": "json_schema", "json_schema": {"schema": schema}}
    url = f"{server.url}/v1/chat/completions"
    with httpx.Client(timeout=60) as http:
        if stream:
            with http.stream("POST", url, json=body) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.TimeoutException):
                http.post(url, json=body, timeout=1.0)
    deadline = time.monotonic() + 30.0  # the whole reply takes longer
    while worker.n_active and time.monotonic() < deadline:
        time.sleep(0.02)
    assert worker.n_active == 0


def test_beyond_the_queue_clients_are_told_when_to_come_back(server: Running) -> None:
    server.pause = 0.1
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 30}

    def post(_: int) -> httpx.Response:
        return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)

    with ThreadPoolExecutor(20) as pool:
        responses = list(pool.map(post, range(20)))
    refused = [r for r in responses if r.status_code == 429]
    assert refused and all(int(r.headers["Retry-After"]) > 0 for r in refused)
    assert {r.status_code for r in responses} == {200, 429}
    assert refused[0].json()["error"]["code"] == "queue_full"


def test_the_cost_of_a_picture_is_what_it_takes(server: Running, client: openai.OpenAI) -> None:
    url = f"{server.url}/v1/vision/cost"
    with Image.open(SAMPLES / "one.png") as image:
        width, height = image.size
    found = httpx.post(url, json={"width": width, "height": height}).json()
    assert found["tokens"] == 35 and found["seconds"] > 0
    small = {"width": width, "height": height, "max_pixels": 12 * 784}
    assert httpx.post(url, json=small).json()["tokens"] <= 12


@pytest.mark.parametrize("max_pixels", [None, 16 * 784])
def test_the_cost_of_a_video_is_what_is_sampled(server: Running, max_pixels: int | None) -> None:
    body = {"kind": "video", "width": 320, "height": 180, "duration": 20, "max_pixels": max_pixels}
    found = httpx.post(f"{server.url}/v1/vision/cost", json=body).json()
    model = server.state.model
    assert model is not None
    preprocessor = model.vision.preprocessor
    frames = np.zeros((40, 180, 320, 3), np.uint8)
    options = replace(preprocessor.sampling, source_fps=2.0)
    if max_pixels is not None:
        options = replace(options, max_pixels=max_pixels)
    seen = load_video(frames, preprocessor, options).frames
    assert (found["height"], found["width"]) == seen.shape[1:3]
    assert found["tokens"] == len(seen) // 2 * seen.shape[1] * seen.shape[2] // 784
