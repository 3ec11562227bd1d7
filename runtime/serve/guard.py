"""Access control: Host header, API key, body size, and the security headers of responses."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qvl.runtime.serve.errors import ApiError, response_of
from qvl.runtime.serve.options import ServeOptions, is_loopback

OPEN_PATHS: Final = ("/", "/health")
OPEN_PREFIXES: Final = ("/page/",)
# The page loads its own files and talks to its own server; nothing else runs or is fetched.
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "media-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
DOCS_POLICY: Final = POLICY.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'")
HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Guard:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, options: ServeOptions) -> None:
        self._app = app
        self._options = options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
        except ApiError as e:
            await response_of(e)(scope, receive, _with_headers(send, scope["path"]))
            return
        await self._app(scope, self._bounded(receive), _with_headers(send, scope["path"]))

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if is_loopback(self._options.host) and not is_loopback(_name(headers.get("host", ""))):
            raise ApiError(
                403,
                f"the Host header is {headers.get('host', '')!r}, expected localhost or a loopback address",
                code="host",
            )
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._options.max_body_bytes:
            raise _too_large(self._options)
        key, path = self._options.api_key, scope["path"]
        if (
            key is None
            or path in OPEN_PATHS
            or path.startswith(OPEN_PREFIXES)
            or _is_preflight(scope, headers)
        ):
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        given = given if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        if not secrets.compare_digest(given.encode(), key.encode()):
            raise ApiError(401, "a wrong or missing API key", code="invalid_api_key")

    def _bounded(self, receive: Receive) -> Callable[[], Awaitable[Message]]:
        """A body sent without its length is counted as it comes."""
        seen = 0

        async def bounded() -> Message:
            nonlocal seen
            message = await receive()
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                if seen > self._options.max_body_bytes:
                    # FastAPI passes on this kind alone from the reading of a body
                    raise HTTPException(413, str(_too_large(self._options)))
            return message

        return bounded


def _is_preflight(scope: Scope, headers: Headers) -> bool:
    return scope["method"] == "OPTIONS" and "access-control-request-method" in headers


def _too_large(options: ServeOptions) -> ApiError:
    return ApiError(413, f"the request body is over {options.max_body_bytes >> 20} MB")


def _name(host: str) -> str:
    """The name in a Host header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


def _with_headers(send: Send, path: str) -> Send:
    policy = DOCS_POLICY if path.startswith("/docs") else POLICY

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers.update({**HEADERS, "Content-Security-Policy": policy})
        await send(message)

    return sending
