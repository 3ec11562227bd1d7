"""Requests made by a fuzzer from the server's own description of itself."""

from __future__ import annotations

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
