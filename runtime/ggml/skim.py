"""A GGUF header read in plain Python: what kind of file it is, and why ggml may refuse it.

ggml's own reader (gguf.py) reads everything and says nothing of what it refuses; this one stops as soon as
it knows. Format: ggml, docs/gguf.md.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from qvl.runtime.ggml.library import Type

VERSIONS: Final = (1, 2, 3)  # version 1 has 32-bit counts, which nothing has written for years
_SIZES: Final = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_LONGEST: Final = 1 << 20  # a key, a name, or a string that is looked at
_KEYS: Final = ("general.architecture", "general.type")


@dataclass(frozen=True)
class Kind:
    """What a file says it is.

    Attributes:
        architecture: `general.architecture`; "clip" for an image encoder, "" where there is none.
        type: `general.type`, such as "model", "mmproj", "imatrix", "adapter"; "" where there is none.
    """

    architecture: str = ""
    type: str = ""


def file_kind(path: Path) -> Kind | None:
    """The kind of a GGUF file by the metadata that stands before its vocabulary; None for anything else."""
    found: dict[str, str] = {}
    try:
        with path.open("rb") as file:
            _, n_metadata = _head(file)
            for key, value in _metadata(file, n_metadata):
                if key in _KEYS and isinstance(value, str):
                    found[key] = value
                if len(found) == len(_KEYS) or key.startswith("tokenizer."):
                    break
    except (OSError, ValueError, struct.error):
        if not found:
            return None
    return Kind(found.get(_KEYS[0], ""), found.get(_KEYS[1], ""))


def refusal(path: Path) -> str | None:
    """Why ggml does not read a GGUF file that is whole: a newer version, or a tensor type it does not
    know."""
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                return None
            (version,) = struct.unpack("<I", file.read(4))
            if version not in VERSIONS:
                big = version & 0xFFFF == 0
                return "big-endian GGUF" if big else f"GGUF version {version}, known are up to {VERSIONS[-1]}"
            file.seek(0)
            n_tensors, n_metadata = _head(file)
            for _ in _metadata(file, n_metadata):
                pass
            for _ in range(n_tensors):
                name = _string(file)
                (n_dims,) = struct.unpack("<I", file.read(4))
                file.seek(8 * min(n_dims, 8), 1)
                kind, _ = struct.unpack("<IQ", file.read(12))
                if kind not in Type._value2member_map_:
                    return f"tensor {name} has type {kind}, which this version does not know"
    except (OSError, ValueError, struct.error):
        pass
    return None


def _head(file: BinaryIO) -> tuple[int, int]:
    """Numbers of tensors and of metadata."""
    magic, version, n_tensors, n_metadata = struct.unpack("<4sIQQ", file.read(24))
    if magic != b"GGUF" or version not in VERSIONS[1:]:
        raise ValueError("not a GGUF file of a known version")
    return n_tensors, n_metadata


def _metadata(file: BinaryIO, count: int) -> Iterator[tuple[str, str | None]]:
    """Keys with their values, if these are strings."""
    for _ in range(count):
        key = _string(file)
        (kind,) = struct.unpack("<I", file.read(4))
        if kind == _STRING:
            yield key, _string(file)
            continue
        yield key, None
        n = 1
        if kind == _ARRAY:
            kind, n = struct.unpack("<IQ", file.read(12))
        if kind == _STRING:
            for _ in range(n):
                (length,) = struct.unpack("<Q", file.read(8))
                _skip(file, length)
        elif kind in _SIZES:
            _skip(file, _SIZES[kind] * n)
        else:
            raise ValueError(f"metadata of type {kind}")


def _skip(file: BinaryIO, n: int) -> None:
    if n >= 1 << 40:
        raise ValueError(f"{n} bytes of metadata")
    if n < 256:
        file.read(n)  # stays within the buffer
    else:
        file.seek(n, 1)


def _string(file: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", file.read(8))
    if length > _LONGEST:
        _skip(file, length)
        return ""
    return file.read(length).decode("utf-8", "replace")
