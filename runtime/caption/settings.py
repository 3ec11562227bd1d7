"""Settings of a run that decide the captions; a file of results has one set of them.

They are kept beside the results, so that a later run with other settings can name the differences.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from qvl.runtime.errors import InputError

Settings = Mapping[str, Any]
"""Names, as the flags have them, and JSON values; one that is None or absent is at its default."""

_SAMPLES: Final = 16
_SAMPLE_BYTES: Final = 1 << 18


def changes(old: Settings, new: Settings) -> list[str]:
    """Each difference as "name: old → new", in words for a person.

    >>> changes({"temp": 0.0, "prompt": "Describe."}, {"temp": 0.5, "prompt": "Describe."})
    ['temp: 0.0 → 0.5']
    """
    names = dict.fromkeys((*old, *new))
    return [f"{n}: {_show(old.get(n))} → {_show(new.get(n))}" for n in names if old.get(n) != new.get(n)]


def _show(value: Any) -> str:
    if value is None:
        return "not set"
    text = value if isinstance(value, str) else repr(value)
    return repr(text[:57] + "…") if len(text) > 60 else repr(text) if isinstance(value, str) else text


def model_identity(path: Path) -> str:
    """A model file's name with a fingerprint of its content, which moving it does not change.

    The whole of it is not read, for that would take seconds a gigabyte: its size, its header and blocks
    spread over the weights tell one model, and one quantization, from another.
    """
    digest = hashlib.blake2b(digest_size=8)
    with path.open("rb") as file:
        size = file.seek(0, 2)
        digest.update(str(size).encode())
        for i in range(_SAMPLES):
            file.seek(size * i // _SAMPLES)
            digest.update(file.read(_SAMPLE_BYTES))
    return f"{path.name} ({digest.hexdigest()})"


def small_file_identity(path: Path) -> str:
    """A small file's name with a fingerprint of its content, for schemas and tables of variables."""
    try:
        content = path.read_bytes()
    except OSError as e:
        raise InputError(f"{path}: cannot be read: {e.strerror}", hint="check the path") from e
    return f"{path.name} ({_digest(content)})"


def schema_identity(schema: Path | Mapping[str, Any]) -> str:
    """A schema's file with a fingerprint of its content, or the fingerprint of a schema without a file."""
    if isinstance(schema, Path):
        return small_file_identity(schema)
    return f"({_digest(json.dumps(schema, sort_keys=True).encode())})"


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def image_seed(seed: int, sha256: str, sample: int = 0) -> int:
    """The seed of one picture's stream: of its content and the run's seed, not of order or parallelism."""
    text = f"{seed}:{sha256}:{sample}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little")
