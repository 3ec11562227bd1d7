from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("fastapi")

import openai
from support.server import Running, running


@pytest.fixture(scope="session")
def server() -> Iterator[Running]:
    with running(parallel=4, queue=8) as found:
        yield found


@pytest.fixture(autouse=True)
def _quick(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "server" in request.fixturenames:
        request.getfixturevalue("server").pause = 0.0


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
