"""Requests made by a fuzzer from the server's own description of itself."""

from __future__ import annotations

import json

import httpx2 as httpx
import pytest
from hypothesis import HealthCheck, given, settings
from support.server import Running

schemathesis = pytest.importorskip("schemathesis")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/vision/cost"])
def test_no_request_breaks_the_server(server: Running, path: str) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operation = schema[path]["POST"]
    seen: set[int] = set()

    @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy())
    def check(case: object) -> None:
        body = getattr(case, "body", None)
        if isinstance(body, dict):
            body["max_tokens" if path.endswith("completions") else "max_output_tokens"] = 2
        response = case.call()  # type: ignore[attr-defined]
        seen.add(response.status_code)
        assert response.status_code < 500, response.text
        if response.status_code >= 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    check()
    assert seen
    assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_half_a_surrogate_pair_is_answered(server: Running, stream: bool) -> None:
    """JSON may hold one; the request is echoed in the response, which must be UTF-8."""
    body = {"input": "Hi", "instructions": "\udcff", "max_output_tokens": 1, "stream": stream}
    head = {"Content-Type": "application/json"}
    done = httpx.post(f"{server.url}/v1/responses", content=json.dumps(body), headers=head, timeout=60)
    assert done.status_code == 200
    assert "server_error" not in done.text
    if not stream:
        assert done.json()["instructions"] == "\udcff"


def test_an_error_that_quotes_half_a_surrogate_pair(server: Running) -> None:
    body = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "\udcff:x"}]}]}
    head = {"Content-Type": "application/json"}
    done = httpx.post(f"{server.url}/v1/chat/completions", content=json.dumps(body), headers=head, timeout=60)
    assert done.status_code == 400
    assert done.json()["error"]["message"]
