"""Errors common to all routes, for the OpenAPI document."""

from __future__ import annotations

from typing import Any, Final

from pydantic import BaseModel


class ErrorDetail(BaseModel):
    """The fields of an error."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """OpenAI's error object."""

    error: ErrorDetail


ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    400: {"model": ErrorBody, "description": "The request cannot be used"},
    401: {"model": ErrorBody, "description": "A wrong or missing API key"},
    403: {"model": ErrorBody, "description": "A Host header that is not this machine's"},
    413: {"model": ErrorBody, "description": "Too large a body, picture or video"},
    429: {"model": ErrorBody, "description": "The queue is full; see Retry-After"},
    500: {"model": ErrorBody, "description": "The model failed"},
    503: {"model": ErrorBody, "description": "The model is loading, or the server is stopping"},
}
