"""Errors in OpenAI's JSON, with the right HTTP status."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from qvl.runtime.errors import BackendError, Cancelled, ContextFullError, InputError, QvlError
from qvl.runtime.files import as_json

log = logging.getLogger("qvl.serve")

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable",
}


class ApiError(Exception):
    """Error reported to the client.

    Attributes:
        status: of HTTP.
        code: machine-readable, in OpenAI's words.
        param: the request's field at fault.
        retry_after: seconds to wait before the next attempt.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after


def body_of(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def from_error(error: BaseException) -> ApiError:
    """Map an exception to the error that the client gets."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextFullError):
        return ApiError(400, error.message, code="context_length_exceeded", param="messages")
    if isinstance(error, InputError):
        return ApiError(400, error.message)
    if isinstance(error, Cancelled):
        return ApiError(503, "the server is stopping", code="stopping")
    if isinstance(error, BackendError):
        return ApiError(500, error.message, code="backend")
    if isinstance(error, QvlError):
        return ApiError(500, error.message)
    log.error("unexpected error", exc_info=error)
    return ApiError(500, f"unexpected {type(error).__name__}", code="internal")


class Json(JSONResponse):
    """A response in JSON; it may quote what a client sent, lone surrogates included."""

    def render(self, content: Any) -> bytes:
        return as_json(content, compact=True).encode()


def response_of(error: ApiError) -> JSONResponse:
    """Build the HTTP response of an error."""
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Json(body_of(error.status, str(error), error.code, error.param), error.status, headers=headers)


def _is_field(part: str | int) -> bool:
    """Tell fields and indices from the names of types, which pydantic puts into the place of an error."""
    return isinstance(part, int) or (part not in ("body", "str") and part.islower() and "[" not in part)


def install(app: FastAPI) -> None:
    """Register handlers that turn every exception of the application into this form."""

    async def known(request: Request, error: Exception) -> JSONResponse:
        return response_of(from_error(error))

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        # of the alternatives of a field, the one that fitted furthest is the one that was meant
        found = max(error.errors(), key=lambda each: len(each["loc"]))
        where = ".".join(str(part) for part in found["loc"] if _is_field(part))
        return response_of(ApiError(400, f"{where}: {found['msg']}" if where else found["msg"], param=where))

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        response = response_of(ApiError(error.status_code, str(error.detail)))
        response.headers.update(error.headers or {})
        return response

    app.add_exception_handler(ApiError, known)
    app.add_exception_handler(QvlError, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
