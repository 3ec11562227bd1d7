"""A GGUF file's tensors as they lie."""

from __future__ import annotations

from pathlib import Path

from qvl.runtime.ggml.gguf import read_gguf


def tensor_bytes(path: Path) -> dict[str, tuple[str, bytes]]:
    """Name to type and bytes."""
    data = path.read_bytes()
    return {
        name: (info.type.name, data[info.offset : info.offset + info.nbytes])
        for name, info in read_gguf(path).tensors.items()
    }
