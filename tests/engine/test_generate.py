"""Streams: pieces, ends, interrupts, JSON."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.chatml import image, text, user

from qvl.convert import Converted
from qvl.runtime import Model, load
from qvl.runtime.engine.text import StopStrings
from qvl.runtime.errors import InputError

GREEDY: dict[str, Any] = {"temperature": 0.0, "repeat_penalty": 1.0}
HELLO = [user("Hello")]


@pytest.fixture(scope="module")
def model(tiny_model: Converted) -> Iterator[Model]:
    with load(tiny_model.text, tiny_model.mmproj, device="cpu", n_ctx=2048, threads=1) as opened:
        yield opened


def test_pieces_make_the_reply(model: Model) -> None:
    stream = model.generate([user(image(56, 84), text("What?"))], max_tokens=30, temperature=1.2, seed=5)
    pieces = list(stream)
    reply = stream.result()
    assert "".join(piece.text for piece in pieces) == reply.text
    assert all(piece.text for piece in pieces)
    assert [t for piece in pieces for t in piece.tokens] == list(reply.tokens)
    assert reply.finish_reason == "length" and reply.usage.completion_tokens == len(reply.tokens) == 30
    assert reply.seed == 5
    assert reply.message == {"role": "assistant", "content": reply.text}
    assert stream.result() is reply and list(stream) == []


def test_figures_of_a_reply(model: Model) -> None:
    start = time.perf_counter()
    fresh = model.session()
    reply = fresh.generate([user(image(112, 140), text("What?"))], max_tokens=20, **GREEDY).result()
    spent = time.perf_counter() - start
    assert reply.usage.image_tokens == 20 < reply.usage.prompt_tokens
    timings = reply.timings
    assert min(timings.encode_seconds, timings.prefill_seconds, timings.generate_seconds) > 0
    assert timings.first_token_seconds + timings.generate_seconds <= spent
    assert reply.prefill_rate == reply.usage.prompt_tokens / timings.prefill_seconds
    assert reply.generate_rate == 20 / timings.generate_seconds


def test_characters_come_whole(model: Model) -> None:
    """Any byte sequence that is UTF-8 streams without replacement characters."""
    wanted = "é日本👩‍👩‍👧🏳️‍🌈Ж"
    grammar = f'root ::= "{wanted}"'
    for seed in range(4):
        stream = model.generate(HELLO, max_tokens=200, temperature=3.0, seed=seed, grammar=grammar)
        pieces = [piece.text for piece in stream]
        assert "".join(pieces) == wanted and stream.result().finish_reason == "stop"
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_stop_string_ends_the_reply_and_is_not_shown(model: Model) -> None:
    grammar = 'root ::= "one two STOP three"'
    stream = model.generate(
        HELLO, max_tokens=100, temperature=2.0, seed=1, grammar=grammar, stop=["STOP", "x"]
    )
    pieces = [piece.text for piece in stream]
    assert "".join(pieces) == stream.result().text == "one two "
    assert stream.result().finish_reason == "stop"
    held = model.generate(
        HELLO, temperature=2.0, seed=1, grammar='root ::= "one STO"', stop=["STOP"]
    ).result()
    assert held.text == "one STO"


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_strings_whatever_the_pieces(whole: str, stops: list[str], data: st.DataObject) -> None:
    found = min((i for i in (whole.find(stop) for stop in stops) if i >= 0), default=None)
    cutter, shown, rest, ended = StopStrings(stops), "", whole, False
    while rest and not ended:
        n = data.draw(st.integers(1, len(rest)))
        safe, ended = cutter.feed(rest[:n])
        shown, rest = shown + safe, rest[n:]
    shown += "" if ended else cutter.finish()
    if found is None:
        assert shown == whole and not ended
    else:
        # the first to be complete ends it, at the latest where the last character of the earliest is seen
        assert ended and whole.startswith(shown) and any(whole[len(shown) :].startswith(s) for s in stops)
        assert not any(stop in shown for stop in stops)


SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}}},
    {"enum": ["red", "green", None, 3]},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
    {
        "type": "object",
        "properties": {
            "label": {"type": "string", "maxLength": 5},
            "box": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 999},
                    "minItems": 4, "maxItems": 4},
        },
        "required": ["label", "box"],
        "additionalProperties": False,
    },
]  # fmt: skip


@pytest.mark.parametrize("schema", SCHEMAS, ids=str)
def test_a_schema_holds(model: Model, schema: dict[str, Any]) -> None:
    for seed in range(5):
        reply = model.generate(HELLO, max_tokens=400, temperature=1.5, seed=seed, schema=schema).result()
        assert reply.finish_reason == "stop"
        check(json.loads(reply.text), schema)
    as_text = model.generate(HELLO, max_tokens=400, temperature=1.5, schema=json.dumps(schema)).result()
    check(json.loads(as_text.text), schema)


def check(value: Any, schema: dict[str, Any]) -> None:
    if "enum" in schema:
        assert value in schema["enum"]
    elif schema["type"] == "object":
        assert isinstance(value, dict) and set(schema.get("required", ())) <= set(value)
        for name, item in value.items():
            check(item, schema["properties"][name])
    elif schema["type"] == "array":
        assert schema["minItems"] <= len(value) <= schema["maxItems"]
        for item in value:
            check(item, schema["items"])
    elif schema["type"] == "integer":
        assert isinstance(value, int) and schema["minimum"] <= value <= schema["maximum"]
    else:
        assert isinstance(value, {"boolean": bool, "string": str}[schema["type"]])
        assert len(str(value)) <= schema.get("maxLength", 5)


def test_end_tokens_end_and_are_not_in_the_text(model: Model) -> None:
    reply = model.generate(HELLO, max_tokens=50, temperature=2.0, seed=3, grammar='root ::= "done"').result()
    assert (reply.text, reply.finish_reason) == ("done", "stop")
    assert not set(reply.tokens) & model.text.vocab.end_tokens


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"stop": "STOP"},
        {"stop": [""]},
        {"grammar": "x", "schema": {}},
    ],
)  # fmt: skip
def test_impossible_requests(model: Model, wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        model.generate(HELLO, **wrong)


def test_cancelling_from_another_thread(model: Model) -> None:
    stream = model.generate(HELLO, max_tokens=1500, temperature=2.0, seed=1, grammar='root ::= "a" root')
    threading.Timer(0.1, stream.cancel).start()
    reply = stream.result()
    assert reply.finish_reason == "cancelled" and 0 < len(reply.tokens) < 1500
    stream.cancel()
    assert stream.result() is reply


def test_leaving_a_stream_half_way(model: Model) -> None:
    first = model.generate(HELLO, max_tokens=100, temperature=2.0, seed=1)
    read = next(first).text
    first.cancel()
    reply = first.result()
    assert reply.finish_reason == "cancelled" and reply.text.startswith(read)
    other = model.generate(HELLO, max_tokens=100, temperature=2.0, seed=1)
    next(other)
    replaced = model.generate([user("Bye")], max_tokens=3, **GREEDY).result()
    assert replaced.usage.completion_tokens == 3
    assert other.result().finish_reason == "cancelled"  # the cache is another prompt's now


def test_a_model_closed_while_it_replies(tiny_model: Converted) -> None:
    model = load(tiny_model.text, device="cpu", n_ctx=512, threads=1)
    streams = [model.session().generate(HELLO, max_tokens=50, temperature=2.0, seed=1) for _ in range(2)]
    for stream in streams:
        next(stream)
    model.close()
    assert streams[0].result().finish_reason == "cancelled"
    del stream, streams  # the other is dropped unread
    with pytest.raises(InputError, match="is closed"):
        model.generate(HELLO)


def test_an_error_comes_again(model: Model) -> None:
    stream = model.generate([user({"type": "image", "image": "/nowhere/x.jpg"})])
    for _ in range(2):
        with pytest.raises(InputError, match=r"x\.jpg"):
            stream.result()


INTERRUPTED = """
import os, signal, sys, threading, time
from qvl.runtime import load

text, mmproj, where = sys.argv[1:]
with load(text, mmproj, device="cpu", n_ctx=16384, threads=1) as model:
    model.generate([{"role": "user", "content": "x"}], max_tokens=1).result()
    long = "word " * 6500 if where == "prefill" else "Hello"
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    start = time.process_time()
    stream = model.generate([{"role": "user", "content": long}], max_tokens=8000, temperature=2.0, seed=1,
                            grammar='root ::= "a" root')
    try:
        stream.result()
        print("not interrupted")
    except KeyboardInterrupt:
        print(round(time.process_time() - start, 2))
    reply = stream.result()
    print(reply.finish_reason, len(reply.tokens))
    again = model.generate([{"role": "user", "content": "Hello"}], max_tokens=3, temperature=0).result()
    print(len(again.tokens))
"""


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("where", ["prefill", "generate"])
def test_ctrl_c(tiny_model: Converted, where: str) -> None:
    """In a process of its own: heard at once, the partial reply kept, the model usable."""
    found = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(tiny_model.text), str(tiny_model.mmproj), where],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    seconds, ended, after = found.stdout.split("\n")[:3]
    assert float(seconds) < 1.5  # of its one thread; another program may have the core meanwhile
    reason, n = ended.split()
    assert reason == "cancelled" and (int(n) == 0) == (where == "prefill")
    assert after == "3"


def test_signals_elsewhere_are_left_alone(model: Model) -> None:
    before = signal.getsignal(signal.SIGINT)
    model.generate(HELLO, max_tokens=2).result()
    assert signal.getsignal(signal.SIGINT) is before
