"""Lifetime of models and of what is opened on them: closing, forking, pickling."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from PIL import Image

import qvl.runtime
from qvl.models import embedded
from qvl.runtime import Model, Record, Stream, load
from qvl.runtime.errors import BackendError, InputError

PICTURE = embedded.path().parent / "samples" / "one.png"
QUESTION = "What is in the picture?"
MESSAGES = [{"role": "user", "content": [{"type": "image", "image": str(PICTURE)}, QUESTION]}]
HELLO = [{"role": "user", "content": "Tell me everything."}]


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with load(device="cpu", threads=1) as opened:
        yield opened


def test_what_holds_native_memory_is_neither_pickled_nor_copied(model: Model) -> None:
    session = model.session(n_ctx=64)
    held = [model, model.text, model.text.vocab, model.vision, model.store, session, session.engine,
            session.generate(MESSAGES), model.context(n_ctx=64)]  # fmt: skip
    for each in held:
        for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match=f"{type(each).__name__} objects cannot be pickled"):
                attempt(each)


def test_results_are_pickled(model: Model) -> None:
    reply, [embedding] = model.ask(PICTURE, QUESTION, max_tokens=2), model.vision.encode([PICTURE])
    assert pickle.loads(pickle.dumps(reply)) == reply
    again = pickle.loads(pickle.dumps(embedding))
    assert again.grid_thw == embedding.grid_thw and np.array_equal(again.embeddings, embedding.embeddings)
    record = Record("a.png", "A star.", boxes=({"label": "star", "box": [1, 2, 3, 4]},))
    assert pickle.loads(pickle.dumps(record)) == record


def test_a_closed_model_says_so() -> None:
    model = load(device="cpu", threads=1)
    vision = model.vision
    [patches] = [vision.preprocessor.image(Image.new("RGB", (56, 56)))]
    model.close()
    model.close()
    assert repr(model).endswith(", closed)")
    attempts: list[Callable[[], object]] = [
        lambda: vision.encode([PICTURE]),
        lambda: vision.encode_video([np.zeros((56, 56, 3), np.uint8)] * 2),
        lambda: vision.encode_patches([patches]),
        lambda: next(vision.encode_steps([patches])),
        lambda: vision.planned_bytes((1, 4, 4)),
        lambda: model.vision,
        lambda: model.generate(MESSAGES),
        lambda: model.ask(PICTURE, QUESTION),
        lambda: model.logits(MESSAGES),
        model.session,
        lambda: model.context(n_ctx=64),
    ]
    for attempt in attempts:
        with pytest.raises(InputError, match="is closed"):
            attempt()


def in_child(work: Callable[[], object], seconds: float = 30) -> int:
    """The exit code of a forked child: 0 when the work raised the error that names the other process."""
    pid = os.fork()
    if pid == 0:
        code = 3
        try:
            work()
            code = 1
        except BackendError as error:
            code = 0 if "was loaded in another process; load it in this one" in str(error) else 2
        finally:
            os._exit(code)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -signal.SIGKILL


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_gets_an_error_and_does_not_hang(model: Model) -> None:
    model.ask(PICTURE, QUESTION, max_tokens=2)  # what computes has threads from here on
    vision, session = model.vision, model.session(n_ctx=512)
    [patches] = [vision.preprocessor.image(Image.new("RGB", (56, 56)))]
    started = model.generate(MESSAGES, max_tokens=8)
    next(started)
    context = model.context(n_ctx=64)
    context.decode_tokens([1, 2], 0)
    attempts: dict[str, Callable[[], object]] = {
        "context.decode_tokens": lambda: context.decode_tokens([3], 2),
        "context.clear": context.clear,
        "context.logits": context.row,
        "session.clear": session.clear,
        "store": lambda: model.store,
        "text.handle": lambda: model.text.handle,
        "ask": lambda: model.ask(PICTURE, QUESTION),
        "generate": lambda: model.generate(MESSAGES).result(),
        "logits": lambda: model.logits(MESSAGES),
        "session": lambda: model.session(),
        "context": lambda: model.context(n_ctx=64),
        "session.generate": lambda: session.generate(MESSAGES).result(),
        "session.prefill": lambda: session.prefill(MESSAGES),
        "a stream under way": started.result,
        "encode": lambda: vision.encode([PICTURE]),
        "encode_patches": lambda: vision.encode_patches([patches]),
        "encode_steps": lambda: next(vision.encode_steps([patches])),
        "caption": lambda: list(qvl.runtime.caption(model, PICTURE)),
    }
    owned = [session, session.engine, context, model.text, vision, model]
    with (
        model._lock,
        vision._lock,
        session._lock,
        session.engine._turns.alone(),
    ):  # as if threads were at work
        codes = {name: in_child(work) for name, work in attempts.items()}
        closed = {type(each).__name__: in_child(each.close) for each in owned}
    assert codes == dict.fromkeys(attempts, 0)
    assert closed == dict.fromkeys(closed, 1) and len(closed) == len(owned)  # no error, and no hang
    assert context.decode_tokens([3], 2) is None
    assert started.result().text  # the parent goes on
    assert vision.encode([PICTURE])[0].n_tokens > 0


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_may_leave_the_models_with_statement() -> None:
    with load(device="cpu", threads=1) as model:

        def leave() -> None:
            with model:
                model.ask(PICTURE, QUESTION)

        assert in_child(leave) == 0
        assert model.ask(PICTURE, QUESTION, max_tokens=2).text


def test_a_closed_session_or_context_says_so(model: Model) -> None:
    session, context = model.session(n_ctx=256), model.context(n_ctx=64)
    stream = session.generate(MESSAGES, max_tokens=9)
    next(stream)
    context.decode_tokens([1], 0, outputs="last")
    for each in (session, session, context, context):
        each.close()
    session.clear()
    assert stream.result().finish_reason == "cancelled"
    attempts: list[Callable[[], object]] = [
        lambda: session.generate(MESSAGES).result(),
        lambda: session.prefill(MESSAGES),
        lambda: context.decode_tokens([2], 1),
        lambda: context.remove(0, 0),
        lambda: context.copy(0, 0),
        lambda: context.keep(0),
        context.last_position,
        context.clear,
        context.row,
        context.logits,
    ]
    for attempt in attempts:
        with pytest.raises(BackendError, match="is closed"):
            attempt()


def test_weights_are_freed_after_the_contexts_on_them() -> None:
    with load(device="cpu", threads=1) as model:
        session, context = model.session(n_ctx=64), model.context(n_ctx=64)
        model.text.close()
        for attempt in (lambda: context.decode_tokens([1], 0), lambda: session.generate(HELLO).result()):
            with pytest.raises(BackendError, match="is closed"):
                attempt()


def test_closing_ends_what_other_threads_read() -> None:
    model = load(device="cpu", threads=1)
    endless = {"max_tokens": 2000, "grammar": 'root ::= "a" root'}
    streams = [model.generate(HELLO, **endless) for _ in range(3)]  # type: ignore[arg-type]
    started, replies = threading.Barrier(4), []

    def read(stream: Stream) -> None:
        next(stream)
        started.wait(60)
        try:
            replies.append(stream.result().finish_reason)
        except BackendError as error:
            replies.append(str(error))

    threads = [threading.Thread(target=read, args=(stream,)) for stream in streams]
    for thread in threads:
        thread.start()
    started.wait(60)
    model.close()
    for thread in threads:
        thread.join(60)
    assert len(replies) == 3
    assert all(said in ("cancelled", "length") or "is closed" in said for said in replies)
