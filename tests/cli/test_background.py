"""Work that goes on while the user types."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from qvl.cli.chat.background import Background
from qvl.runtime.errors import Cancelled, ImageError


def test_background_work_can_be_called_off() -> None:
    background, started = Background(), threading.Event()

    def work(cancel: threading.Event, progress: Any) -> None:
        started.set()
        cancel.wait(10)
        raise Cancelled("stopped")

    background.start(work)
    started.wait(10)
    assert background.running
    background.cancel()
    assert not background.running
    background.wait()


def test_background_errors_come_out_at_the_wait() -> None:
    background = Background()

    def work(cancel: threading.Event, progress: Any) -> None:
        raise ImageError("no picture")

    background.start(work)
    with pytest.raises(ImageError):
        background.wait()
    background.wait()
