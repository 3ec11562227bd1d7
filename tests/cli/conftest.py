"""A conversation with a model that answers by rote."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from support.rote import RoteSession

from qvl.cli.chat.conversation import Conversation
from qvl.cli.chat.repl import Repl
from qvl.cli.options import SamplingOptions
from qvl.cli.output import Output
from qvl.runtime.grounding.tags import GroundingParser
from qvl.runtime.vision.preprocess import Preprocessor


@pytest.fixture
def session() -> RoteSession:
    return RoteSession()


@pytest.fixture
def repl(session: RoteSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Repl]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    model: Any = SimpleNamespace(
        session=lambda: session,
        path=Path("m.gguf"),
        vision=SimpleNamespace(preprocessor=Preprocessor()),
        grounding=lambda choose, resized: GroundingParser(choose=choose, resized=resized),
    )
    repl = Repl(Conversation(model, SamplingOptions()), Output())
    yield repl
    repl.conversation.close()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    Image.new("RGB", (200, 100), "white").save(path)
    return path
