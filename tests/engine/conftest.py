"""The tiny model's decoder, and a context, a session and backend for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.sessions import FakeBackend, new_session

from qvl.convert import Converted
from qvl.runtime.engine.session import Session
from qvl.runtime.llama.context import Context
from qvl.runtime.llama.model import LlamaModel


@pytest.fixture(scope="session")
def model(tiny_model: Converted) -> Iterator[LlamaModel]:
    with LlamaModel(tiny_model.text, device="cpu") as opened:
        yield opened


@pytest.fixture
def context(model: LlamaModel) -> Iterator[Context]:
    with Context(model, n_ctx=512, n_batch=512, n_outputs_max=512, kv_type="f32", threads=1) as opened:
        yield opened


@pytest.fixture
def backend(model: LlamaModel) -> FakeBackend:
    return FakeBackend(model.hparams.n_embd)


@pytest.fixture
def session(model: LlamaModel, backend: FakeBackend) -> Iterator[Session]:
    opened = new_session(model, backend)
    yield opened
    opened.close()
