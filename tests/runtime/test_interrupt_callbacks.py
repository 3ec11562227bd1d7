"""What a callback raises while C calls it ends the work, comes out of the call, and leaves nothing behind."""

from __future__ import annotations

import ast
import logging
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from support.chatml import text, user

from qvl.convert import Converted, convert
from qvl.models import embedded
from qvl.runtime import load
from qvl.runtime.find import ModelFiles
from qvl.runtime.ggml.imatrix import read_imatrix
from qvl.runtime.interrupt import CallbackGuard
from qvl.runtime.llama import worker
from qvl.runtime.llama.binding import llama, log_guard
from qvl.runtime.llama.context import Context
from qvl.runtime.llama.model import LlamaModel
from qvl.runtime.measure.activations import InputSums
from qvl.runtime.measure.calibrate import CalibrationPlan, calibrate
from qvl.runtime.measure.samples import Example
from qvl.runtime.vision.cache import EmbeddingCache

PICTURE = np.random.default_rng(0).integers(0, 255, (112, 112, 3), np.uint8)
TOKENS = list(range(100, 140))


class Odd(Exception):
    """What no code of qvl raises or expects."""


class Failing:
    """An observer, or a callback, that raises at its n-th call."""

    def __init__(self, at: int, error: Callable[[], BaseException] = Odd) -> None:
        self.calls, self.at, self.error = 0, at, error

    def __call__(self, *_: object) -> bool:
        self.calls += 1
        if self.calls == self.at:
            raise self.error()
        return True

    def wants(self, node: int) -> bool:
        return True

    def take(self, node: int) -> None:
        self()


@pytest.fixture(autouse=True)
def nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """ctypes prints "Exception ignored on calling ctypes callback function" when one gets through."""
    yield
    assert "Exception ignored" not in capfd.readouterr().err


def test_a_guard_calls_nothing_after_a_failure_and_raises_once() -> None:
    guard, failing = CallbackGuard(), Failing(2)
    callback = guard.wrap(failing, lambda *_: False)
    assert [callback(1), callback(2), callback(3)] == [True, False, False]
    assert failing.calls == 2
    assert guard.failed
    with pytest.raises(Odd):
        guard.check()
    guard.check()
    assert callback(4) is True


@pytest.mark.parametrize("error", [Odd, MemoryError, KeyboardInterrupt, SystemExit])
def test_progress_of_encoding(tiny_model: Converted, error: type[BaseException]) -> None:
    with load(tiny_model.text.parent, device="cpu") as model:
        (whole,) = model.vision.encode([PICTURE])
        failing = Failing(1, error)
        with pytest.raises(error):
            model.vision.encode([PICTURE], progress=failing)
        assert failing.calls == 1
        (again,) = model.vision.encode([PICTURE])
    assert np.array_equal(again.embeddings, whole.embeddings)


def test_an_observer_of_the_encoder(tiny_model: Converted) -> None:
    with load(tiny_model.text.parent, device="cpu") as model:
        (whole,) = model.vision.encode([PICTURE])
        model.vision.observer = failing = Failing(3)
        with pytest.raises(Odd):
            model.vision.encode([PICTURE])
        assert failing.calls == 3
        model.vision.observer = None
        (again,) = model.vision.encode([PICTURE])
    assert np.array_equal(again.embeddings, whole.embeddings)


@pytest.mark.parametrize("n_tokens", [1, 40])  # in this thread, and in one of its own
def test_an_observer_of_the_decoder(model: LlamaModel, n_tokens: int) -> None:
    failing = Failing(2)
    with (
        Context(model, n_ctx=64, kv_type="f32", threads=1) as plain,
        Context(model, n_ctx=64, kv_type="f32", threads=1, observer=failing) as context,
    ):
        plain.decode_tokens(TOKENS[:n_tokens], 0, outputs="last")
        with pytest.raises(Odd):
            context.decode_tokens(TOKENS[:n_tokens], 0, outputs="last")
        assert failing.calls == 2
        context.remove(0, 0)
        context.decode_tokens(TOKENS[:n_tokens], 0, outputs="last")
        assert np.array_equal(context.logits(), plain.logits())


def test_ctrl_c_in_an_observer_of_one_token(model: LlamaModel) -> None:
    """Too few tokens for a thread of their own, so the signal finds the callback."""

    class Pressing(Failing):
        def take(self, node: int) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    with (
        Context(model, n_ctx=64, threads=1, observer=Pressing(0)) as context,
        pytest.raises(KeyboardInterrupt),
    ):
        context.decode_tokens([100], 0)


def test_the_question_whether_to_abort() -> None:
    aborted = threading.Event()

    def call() -> int:
        return 2 if aborted.wait(10) else 0

    with pytest.raises(Odd):
        worker.run(call, 400, aborted.set, Failing(1))
    assert aborted.is_set()


def test_progress_of_loading(tiny_model: Converted) -> None:
    with pytest.raises(Odd):
        LlamaModel(tiny_model.text, device="cpu", progress=Failing(2))


def test_a_handler_of_the_log(tiny_model: Converted) -> None:
    class Handler(logging.Handler):
        def handle(self, record: logging.LogRecord) -> bool:
            raise Odd

    handler, logger = Handler(), logging.getLogger("qvl.llama")
    level = logger.level
    llama()
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        with pytest.raises(Odd):
            LlamaModel(tiny_model.text, device="cpu")
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        log_guard.reset()


def test_an_observer_of_calibration(
    tiny_model: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was counted before is kept, the prompt that failed is not, and the run goes on to the same end."""
    files = ModelFiles(tiny_model.text, tiny_model.mmproj)
    plan = CalibrationPlan(tuple(Example(f"question {i}", PICTURE) for i in range(3)), reply_tokens=0)
    whole = calibrate(files, plan, tmp_path / "whole.gguf", n_ctx=256)
    real, calls = InputSums.take, 0

    def take(self: InputSums, node: int) -> None:
        nonlocal calls
        calls += 1
        if calls == n_calls // 3 + 20:
            raise Odd
        real(self, node)

    monkeypatch.setattr(InputSums, "take", take)
    n_calls = 10**9
    calibrate(files, plan, tmp_path / "counted.gguf", n_ctx=256)
    n_calls, calls = calls, 0
    with pytest.raises(Odd):
        calibrate(files, plan, tmp_path / "cut.gguf", n_ctx=256)
    assert read_imatrix(tmp_path / "cut.gguf").chunks == 1
    monkeypatch.setattr(InputSums, "take", real)
    calibrate(files, plan, tmp_path / "cut.gguf", n_ctx=256)
    resumed = read_imatrix(tmp_path / "cut.gguf")
    assert resumed.chunks == 3
    for name, entry in whole.entries.items():
        np.testing.assert_allclose(resumed.entries[name].sums, entry.sums, rtol=1e-6)


def test_a_reply_after_a_failure_is_right_and_so_is_the_cache_on_disk(tmp_path: Path) -> None:
    """With the trained model, whose words tell whether it saw the picture whole."""
    sample = embedded.path().parent / "samples" / "one.png"
    question = [user({"type": "image", "image": str(sample)}, text("What is in the picture?"))]
    options = {"max_tokens": 16, "temperature": 0.0}

    def asked(folder: Path | None, **more: object) -> str:
        cache = None if folder is None else EmbeddingCache(folder)
        with load(device="cpu", cache=cache) as model:
            if more:
                with pytest.raises(Odd):
                    model.generate(question, **options, **more).result()
            return model.generate(question, **options).result().text

    right = asked(None)
    for at in (1, 2, 4):
        folder = tmp_path / str(at)
        assert asked(folder, progress=Failing(at)) == right
        assert asked(folder) == right


def test_progress_of_conversion(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(Odd):
        convert(tiny_checkpoint, tmp_path, "q8_0", "q8_0", progress=Failing(4))
    assert not list(tmp_path.iterdir())


def callbacks_made(source: str) -> list[tuple[int, bool]]:
    """Line of every C callback that a source makes of a Python function, and whether a guard wraps that.

    A callback's type is one by name (`ggml.EvalCallback`, `llama.llama_log_callback`) or is made on the spot
    (`CFUNCTYPE(…)(…)`, which is no callback if it is given an address).
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        kind, given = node.func, node.args[0]
        name = kind.attr if isinstance(kind, ast.Attribute) else getattr(kind, "id", "")
        on_the_spot = isinstance(kind, ast.Call) and ast.unparse(kind.func).endswith("FUNCTYPE")
        by_name = name.endswith(("Callback", "_callback")) and not re.match("(.*_)?set_|eval_|_as_", name)
        if not (on_the_spot or by_name) or (isinstance(given, ast.Name) and given.id == "address"):
            continue
        wrapped = isinstance(given, ast.Call) and ast.unparse(given.func).endswith(".wrap")
        found.append((node.lineno, wrapped))
    return found


def test_every_callback_of_c_is_wrapped_by_a_guard() -> None:
    root = Path(__file__).parents[2]
    made = {
        f"{path.relative_to(root)}:{line}": wrapped
        for folder in ("runtime", "convert", "cli", "models")
        for path in (root / folder).rglob("*.py")
        for line, wrapped in callbacks_made(path.read_text(encoding="utf-8"))
    }
    assert {place.partition(":")[0] for place in made} == {
        "runtime/ggml/scheduler.py",
        "runtime/llama/binding.py",
        "runtime/llama/model.py",
    }
    assert [place for place, wrapped in made.items() if not wrapped] == []
    assert callbacks_made("c.llama_log_callback(log)\nCFUNCTYPE(None)(lambda: 0)") == [(1, False), (2, False)]
