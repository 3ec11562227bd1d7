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
from qvl.cli.chat.detail import DetailPolicy
from qvl.cli.chat.repl import Repl
from qvl.cli.options import SamplingOptions
from qvl.cli.output import Output
from qvl.runtime.detail.cost import Throughput
from qvl.runtime.families.qwen2_vl.tower import VisionConfig
from qvl.runtime.grounding.tags import GroundingParser
from qvl.runtime.vision.preprocess import Preprocessor

CONFIG = VisionConfig(32, 1280, 5120, 16, 1536, 14, 2, 1e-6)


@pytest.fixture
def session() -> RoteSession:
    return RoteSession()


@pytest.fixture
def repl(session: RoteSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Repl]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    model: Any = SimpleNamespace(
        session=lambda: session,
        path=Path("m.gguf"),
        n_ctx=8192,
        has_vision=True,
        vision=SimpleNamespace(preprocessor=Preprocessor(), config=CONFIG),
        grounding=lambda choose, resized: GroundingParser(choose=choose, resized=resized),
    )
    detail = DetailPolicy(model, None)
    detail.estimator.throughput = Throughput(1024, 1.0, 0.01)
    repl = Repl(Conversation(model, SamplingOptions()), Output(), detail)
    yield repl
    repl.conversation.close()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    Image.new("RGB", (200, 100), "white").save(path)
    return path
