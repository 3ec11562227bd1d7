"""The Python API explains itself: names, signatures, representations, and errors where it cannot be used."""

from __future__ import annotations

import copy
import inspect
import json
import multiprocessing
import os
import pickle
import pydoc
import signal
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from PIL import Image

import qvl.runtime
from qvl.models import embedded
from qvl.runtime import Model, Record, Reply, Session, VisionEmbedding, load
from qvl.runtime.engine.options import DEFAULTS
from qvl.runtime.errors import BackendError, InputError

PICTURE = embedded.path().parent / "samples" / "one.png"
QUESTION = "What is in the picture?"
MESSAGES = [{"role": "user", "content": [{"type": "image", "image": str(PICTURE)}, QUESTION]}]


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with load(device="cpu", threads=1) as opened:
        yield opened


def parameters(function: Callable[..., object]) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def test_the_package_lists_its_public_names_and_has_them_all() -> None:
    assert dir(qvl.runtime) == sorted(qvl.runtime.__all__)
    assert {"load", "caption", "Model", "Reply", "Record", "Session"} <= set(dir(qvl.runtime))
    for name in dir(qvl.runtime):
        assert callable(getattr(qvl.runtime, name))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = qvl.runtime.nothing


def test_model_and_session_take_the_same_parameters() -> None:
    expected = parameters(Session.generate)
    assert parameters(Model.generate) == expected
    assert parameters(Model.ask)[3:] == expected[2:]


def test_options_are_spelled_out_and_others_refused(model: Model) -> None:
    shown = {p.name: p.default for p in parameters(Model.generate)[2:]}
    assert shown == dict(DEFAULTS)
    assert "temperature: 'float | None' = None" in pydoc.plain(pydoc.render_doc(Model.ask))
    for call in (model.generate, model.session(n_ctx=64).generate):
        with pytest.raises(TypeError, match="'temprature', expected one of max_tokens, temperature"):
            call(MESSAGES, temprature=0.5)  # type: ignore[call-arg]


def test_a_question_about_a_picture_is_one_line(model: Model) -> None:
    reply = model.ask(PICTURE, QUESTION, temperature=0, max_tokens=12)
    streamed = model.generate(MESSAGES, temperature=0, max_tokens=12).result()
    assert reply.text == streamed.text != ""
    with Image.open(PICTURE) as image:
        assert model.ask(image, QUESTION, temperature=0, max_tokens=12).text == reply.text
    assert len(model.ask(PICTURE, QUESTION, max_tokens=1).tokens) == 1


@pytest.mark.parametrize("question", [None, 5, b"what", ["what"]])
def test_a_question_that_is_no_text_is_refused(model: Model, question: object) -> None:
    with pytest.raises(InputError, match="question is"):
        model.ask(PICTURE, question)  # type: ignore[arg-type]


def test_every_option_reaches_the_reply(model: Model) -> None:
    seen: list[str] = []
    schema = {"type": "object", "properties": {"n": {"enum": [1]}}, "required": ["n"]}
    reply = model.ask(
        PICTURE, QUESTION, temperature=1.5, top_k=9, top_p=0.9, min_p=0.01, repeat_penalty=1.1, seed=7,
        schema=schema, number_images=True, progress=lambda stage, _: seen.append(stage),
    )  # fmt: skip
    assert json.loads(reply.text) == {"n": 1}
    assert reply.seed == 7 and "prefill" in seen
    assert model.ask(PICTURE, QUESTION, grammar='root ::= "ab"').text == "ab"
    assert model.ask(PICTURE, QUESTION, grammar='root ::= "abc"', stop=["b"]).text == "a"
    for wrong in ({"top_k": "x"}, {"top_p": 2}, {"min_p": -1}, {"repeat_penalty": "x"}, {"temperature": -1}):
        with pytest.raises(InputError):
            model.ask(PICTURE, QUESTION, **wrong)


def test_representations_are_short_and_print_no_arrays(model: Model) -> None:
    assert repr(model).startswith("Model('") and "n_ctx=8192" in repr(model) and ".gguf" in repr(model)
    embedding = VisionEmbedding(np.zeros((6, 32), np.float32), (1, 4, 6))
    assert repr(embedding) == "VisionEmbedding(6 tokens of 32 values, grid_thw=(1, 4, 6))"
    assert repr(Reply("A star.", (1, 2), "stop")) == "Reply('A star.', 2 tokens, 'stop')"
    assert repr(Record("a.png", "A star.", sha256="0" * 64)) == "Record('a.png', caption='A star.')"
    assert repr(Record("a.png", error="no picture")) == "Record('a.png', error='no picture')"
    long = "word " * 1000
    for value in (Reply(long, (1,) * 1000, "length"), Record("a.png", long), Record("a.png", error=long)):
        assert len(repr(value)) < 200


def test_a_model_is_neither_pickled_nor_copied(model: Model) -> None:
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="a Model cannot be pickled"):
            attempt(model)


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
    attempts: dict[str, Callable[[], object]] = {
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
    with model._lock, vision._lock, session._lock:  # as if other threads had been at work
        codes = {name: in_child(work) for name, work in attempts.items()}
        closed = in_child(lambda: (model.close(), vision.close()))
    assert codes == dict.fromkeys(attempts, 0)
    assert closed == 1  # no error, and no hang
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
