"""Settings of a server: address, key, bounds."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from qvl.runtime.errors import InputError


def is_loopback(host: str) -> bool:
    """Tell loopback addresses, which only this machine reaches, from others."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class ServeOptions:
    """A server's settings.

    Attributes:
        host, port: where it listens.
        api_key: asked of every request but those for the page's files and `/health`.
        parallel: replies written at the same time.
        queue: requests that may wait beyond those; more are answered with 429.
        media_path: folder whose files `file://` addresses may name; None allows none.
        cors: origins whose pages may call the server.
        max_body_bytes: largest request body.
        max_media_bytes: largest picture or video in a request.
        max_pictures: pictures and videos in a request.

    Raises:
        InputError: an address that others can reach without a key, or a value out of bounds.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    parallel: int = 4
    queue: int = 32
    media_path: Path | None = None
    cors: tuple[str, ...] = ()
    max_body_bytes: int = 256 << 20
    max_media_bytes: int = 128 << 20
    max_pictures: int = 64

    def __post_init__(self) -> None:
        if not self.api_key and not is_loopback(self.host):
            raise InputError(
                f"{self.host} can be reached from other machines, and no API key is set",
                hint="set api_key, or listen on 127.0.0.1",
            )
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise InputError("the API key has characters beyond printable ASCII")
        if not 1 <= self.parallel <= 256:
            raise InputError(f"parallel is {self.parallel}, expected 1 to 256")
        if self.media_path is not None and not self.media_path.is_dir():
            raise InputError(f"{self.media_path}: no such folder, expected one with pictures and videos")
        for origin in self.cors:
            if origin == "*" and not self.api_key:
                raise InputError("every origin is allowed (*), and no API key is set", hint="set api_key")
