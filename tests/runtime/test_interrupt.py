"""Ctrl-C in the middle of C code is neither lost nor printed."""

from __future__ import annotations

import os
import signal
import threading

import numpy as np
import pytest

from qvl.convert import Converted
from qvl.runtime import load
from qvl.runtime.interrupt import held_interrupts
from qvl.runtime.llama.model import LlamaModel


def press_ctrl_c(*_: float) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_waits_for_the_end() -> None:
    after = False
    with pytest.raises(KeyboardInterrupt), held_interrupts() as pressed:
        assert not pressed()
        press_ctrl_c()
        assert pressed()
        after = True
    assert after
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_the_programs_own_stays() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        with held_interrupts() as pressed:
            press_ctrl_c()
            assert not pressed()
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [signal.SIGINT]


def test_other_threads_are_left_alone() -> None:
    done: list[bool] = []

    def work() -> None:
        with held_interrupts() as pressed:
            done.append(pressed())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [False]


def test_loading_stops(tiny_model: Converted) -> None:
    with pytest.raises(KeyboardInterrupt):
        LlamaModel(tiny_model.text, device="cpu", progress=press_ctrl_c)


def test_encoding_stops_and_works_again(tiny_model: Converted, capfd: pytest.CaptureFixture[str]) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (112, 112, 3), np.uint8)
    with load(tiny_model.text.parent, device="cpu") as model:
        (whole,) = model.vision.encode([picture])
        with pytest.raises(KeyboardInterrupt):
            model.vision.encode([picture], progress=press_ctrl_c)
        (again,) = model.vision.encode([picture])
    assert np.array_equal(again.embeddings, whole.embeddings)
    assert "Exception ignored" not in capfd.readouterr().err


class Left(SystemExit):
    """What a program's own handler raises."""


def leave(*_: object) -> None:
    raise Left


def test_a_handler_of_sigterm_that_raises_is_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGTERM, leave)
    monkeypatch.setattr("qvl.runtime.interrupt.RAISING", [leave])
    reached = False
    try:
        with pytest.raises(Left), held_interrupts() as pressed:
            signal.raise_signal(signal.SIGTERM)
            assert pressed()
            reached = True
        assert reached
        assert signal.getsignal(signal.SIGTERM) is leave
    finally:
        signal.signal(signal.SIGTERM, before)
