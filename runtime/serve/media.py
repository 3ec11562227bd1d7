"""Reads pictures and videos of requests: data: URLs, base64, file:// below one folder. Nothing is fetched."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

from qvl.runtime.serve.errors import ApiError
from qvl.runtime.serve.options import ServeOptions


def read_url(url: str, options: ServeOptions, where: str) -> bytes | Path:
    """The bytes of a data: URL, or the path that a file:// address names.

    Raises:
        ApiError: 400 for another kind of address, a path outside the media folder, damaged base64; 413 for
            more than `options.max_media_bytes`.
    """
    if url.startswith("data:"):
        head, comma, body = url.partition(",")
        if not comma:
            raise ApiError(400, f"{where}: a data: URL without a comma", param=where)
        if head.endswith(";base64"):
            return decode(body, options, where)
        return _bounded(unquote_to_bytes(body), options, where)
    if url.startswith("file:"):
        return _local(url, options, where)
    scheme = url.partition(":")[0][:20]
    raise ApiError(
        400,
        f"{where}: {scheme!r} addresses are not read; send the picture as a data: URL",
        code="unsupported_url",
        param=where,
    )


def decode(text: str, options: ServeOptions, where: str) -> bytes:
    """Base64 to bytes.

    Raises:
        ApiError: as `read_url`.
    """
    try:
        return _bounded(base64.b64decode(text.encode("ascii"), validate=True), options, where)
    except (binascii.Error, UnicodeEncodeError) as e:
        raise ApiError(400, f"{where}: damaged base64: {e}", param=where) from e


def _bounded(data: bytes, options: ServeOptions, where: str) -> bytes:
    if len(data) > options.max_media_bytes:
        raise ApiError(413, f"{where}: over {options.max_media_bytes >> 20} MB", param=where)
    return data


def _local(url: str, options: ServeOptions, where: str) -> Path:
    """A file below the media folder, links resolved; outside and missing give the same answer."""
    missing = ApiError(400, f"{where}: no such file in the server's media folder", param=where)
    if options.media_path is None:
        raise ApiError(400, f"{where}: this server reads no local files", code="unsupported_url", param=where)
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise missing
    root = options.media_path.resolve()
    try:
        named = Path(url2pathname(parts.path))
        path = (
            named if named.is_absolute() and named.is_relative_to(root) else root / str(named).lstrip("/\\")
        )
        path = path.resolve(strict=True)
    except (OSError, ValueError, RuntimeError):
        raise missing from None
    if not path.is_relative_to(root) or not path.is_file():
        raise missing
    return path
