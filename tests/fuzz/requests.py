"""Mutated input of people and programs: conversations, schemas, sessions, and HTTP requests to the server."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import socket
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from random import Random
from typing import Any, Final
from urllib.parse import urlsplit

from fuzz.mutate import dump, mutate_bytes, mutate_json
from qvl.cli.chat import sessions
from qvl.cli.options import SamplingOptions
from qvl.models import embedded
from qvl.runtime import load
from qvl.runtime.grammar.schema import read_schema, schema_to_grammar
from qvl.runtime.llama.sampler import Sampler, Sampling

PATIENCE: Final = 60.0  # seconds for an answer
SAMPLES: Final = embedded.path().parent / "samples"
SCHEMA: Final = {
    "$defs": {
        "box": {"type": "object", "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 999}}}
    },
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 20},
        "boxes": {"type": "array", "items": {"$ref": "#/$defs/box"}, "minItems": 1, "maxItems": 4},
        "kind": {"enum": ["a", 1, None, True]},
        "n": {"anyOf": [{"type": "number"}, {"const": "none"}]},
        "both": {"allOf": [{"type": "object"}, {"properties": {"a": {"type": "boolean"}}}]},
    },
    "required": ["name", "boxes"],
    "additionalProperties": False,
}
ONE: Final = str(SAMPLES / "one.png")
SESSION: Final = {
    "qvl_session": 1,
    "saved": "2026-01-01T00:00:00+00:00",
    "model": "m.gguf",
    "system": "Be brief.",
    "settings": {"temperature": 0.5, "max_tokens": 4, "seed": 3, "top_k": 5},
    "messages": [
        {"role": "user", "content": [{"type": "image", "image": ONE, "max_pixels": 50000},
                                     {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "A star."},
    ],
}  # fmt: skip


def json_file(name: str, value: Any) -> Callable[[Path, Random], Path]:
    """Writes a mutated JSON value under a name."""

    def make(work: Path, rng: Random) -> Path:
        data = dump(mutate_json(value, rng))
        out = work / name
        out.write_bytes(mutate_bytes(data, rng) if rng.random() < 0.2 else data)
        return out

    return make


@cache
def opened() -> Any:
    """The embedded model, opened once in a child."""
    return load(device="cpu", n_ctx=512, threads=1)


def use_schema(path: Path) -> None:
    grammar = schema_to_grammar(read_schema(path))
    with Sampler(opened().text.vocab, Sampling(), grammar):
        pass


def use_session(path: Path) -> None:
    saved = sessions.load(str(path))
    messages = [*saved.messages, {"role": "user", "content": "And?"}]
    known = {f.name for f in fields(SamplingOptions)} & saved.settings.keys()
    settings = {name: saved.settings[name] for name in known}
    opened().generate(messages, **{**settings, "max_tokens": 1}).result()


def use_messages(path: Path) -> None:
    try:
        messages = json.loads(path.read_text(encoding="utf-8", errors="surrogatepass"))
    except (ValueError, RecursionError):
        return  # the caller's own parser
    opened().generate(messages, max_tokens=1).result()


# HTTP ------------------------------------------------------------------------------------------------------


def _url(name: str, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode((SAMPLES / name).read_bytes()).decode()}"


_IMAGE: Final = _url("one.png", "image/png")
_PART: Final = {"type": "image_url", "image_url": {"url": _IMAGE, "detail": "low"}}
_VIDEO: Final = {"type": "input_video", "input_video": {"data": _url("moves.mp4", "").partition(",")[2]}}
_TOOL: Final = {"type": "function", "function": {"name": "look", "description": "d", "parameters": SCHEMA}}
BODIES: Final[tuple[tuple[str, dict[str, Any]], ...]] = (
    ("/v1/chat/completions", {
        "model": "nano", "max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "seed": 1, "n": 2, "stop": ["."],
        "logprobs": True, "top_logprobs": 2, "stream": True, "stream_options": {"include_usage": True},
        "messages": [{"role": "system", "content": "Be brief."},
                     {"role": "user", "content": [_PART, {"type": "text", "text": "What is it?"}]}],
    }),
    ("/v1/chat/completions", {
        "max_completion_tokens": 2, "min_pixels": 784, "max_pixels": 50000,
        "messages": [{"role": "user", "content": [{**_VIDEO, "fps": 1.0}, {"type": "text", "text": "And?"}]}],
    }),
    ("/v1/chat/completions", {
        "max_tokens": 4, "tools": [_TOOL], "tool_choice": {"type": "function", "function": {"name": "look"}},
        "messages": [{"role": "user", "content": "x"},
                     {"role": "assistant", "content": None, "tool_calls": [
                         {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}]},
                     {"role": "tool", "tool_call_id": "1", "content": "y"}],
    }),
    ("/v1/chat/completions", {
        "max_tokens": 3, "messages": [{"role": "user", "content": "x"}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}},
    }),
    ("/v1/responses", {
        "max_output_tokens": 2, "instructions": "Be brief.", "stream": True, "temperature": 0.0,
        "text": {"format": {"type": "json_schema", "schema": {"type": "object"}}},
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "x"},
                                               {"type": "input_image", "image_url": _IMAGE}]}],
    }),
    ("/v1/vision/cost", {"kind": "video", "width": 640, "height": 480, "duration": 3.5, "max_pixels": 50000}),
)  # fmt: skip


@cache
def address() -> tuple[str, int]:
    """A server in this process with the embedded model, started once."""
    from support.server import running

    server = _OPEN.enter_context(running(n_ctx=512, parallel=2, queue=200))
    _RUNNING.append(server)
    parts = urlsplit(server.url)
    return str(parts.hostname), int(parts.port or 0)


_OPEN: Final = contextlib.ExitStack()
_RUNNING: Final[list[Any]] = []


def make_http(work: Path, rng: Random) -> Path:
    """A request as it goes over the wire, `Connection: close`."""
    path, body = rng.choice(BODIES)
    data = dump(mutate_json(body, rng))
    if rng.random() < 0.15:
        data = mutate_bytes(data, rng)
    head = [
        f"POST {path} HTTP/1.1".encode(),
        b"Host: 127.0.0.1",
        b"Content-Type: application/json",
        b"Connection: close",
        b"Content-Length: %d" % len(data),
    ]
    match rng.randrange(30):
        case 0:
            head[0] = b"%s %s HTTP/1.1" % (
                rng.choice((b"GET", b"PUT", b"OPTIONS", b"HEAD", b"BREW")),
                rng.choice(
                    (
                        path.encode(),
                        b"/",
                        b"/metrics",
                        b"/v1/models/%00",
                        b"/page/../../x",
                        b"/" + b"a" * 9000,
                    )
                ),
            )
        case 1:
            head[1] = b"Host: " + rng.choice((b"example.com", b"", b"[::1", b"localhost:1:2", b"\xff"))
        case 2:
            head[2] = b"Content-Type: " + rng.choice(
                (b"text/plain", b"multipart/form-data", b"a/b; charset=\xff")
            )
        case 3:
            head.append(b"Authorization: " + rng.choice((b"Bearer \xff", b"", b"Basic x")))
        case 4:
            head.append(b"X: " + b"y" * 70_000)
        case 5:
            head = [mutate_bytes(line, rng) for line in head]
    out = work / "case.http"
    out.write_bytes(b"\r\n".join(head) + b"\r\n\r\n" + data)
    return out


def use_http(path: Path) -> None:
    """Send a request; whatever is answered, it is no failure of the server, and the server lives."""
    sent = path.read_bytes()
    head, _, _ = sent.partition(b"\r\n\r\n")
    sound = b"\r\nConnection: close" in head and b"Content-Length: " in head
    answer = _exchange(sent, PATIENCE if sound else 0.3)  # the server may well wait for more of a damaged one
    assert _RUNNING[0].state.worker.is_alive
    response = HTTPResponse(_Received(answer), method=head.partition(b" ")[0].decode("latin-1"))  # type: ignore[arg-type]
    try:
        response.begin()
        body = response.read()
    except HTTPException as error:
        assert not (sound and answer), f"half an answer: {error!r}"
        return
    assert response.status < 500, f"status {response.status}: {body[:300]!r}"
    if response.status >= 400 and body[:1] == b"{":
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
    assert b'"server_error"' not in body, body[:300]


def _exchange(sent: bytes, patience: float) -> bytes:
    """Read from the server until it closes, or sends nothing for so long."""
    received = bytearray()
    with contextlib.suppress(ConnectionError), socket.create_connection(address()) as connection:
        connection.sendall(sent)
        step = min(patience, 1.0)
        connection.settimeout(step)
        waited = 0.0  # in steps: this process may be stopped meanwhile
        while waited < patience:
            try:
                data = connection.recv(1 << 16)
            except TimeoutError:
                waited += step
                continue
            if not data:
                return bytes(received)
            received += data
        assert patience < PATIENCE, f"no end of the answer after {len(received)} bytes"
    return bytes(received)


class _Received:
    """Bytes in the place of a socket."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)

    def makefile(self, mode: str) -> io.BytesIO:
        return self._file
