"""Memory that llama.cpp would allocate for a context, found without allocating it.

llama.cpp can go through the motions of loading (`no_alloc`): it plans every buffer and reads no weight.
Its C interface does not tell the sizes, its log does, so they are read there. The log's format is that of
the pinned version, and a test holds the sizes against a real context's.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qvl.runtime.errors import BackendError
from qvl.runtime.ggml.gguf import read_gguf
from qvl.runtime.llama.binding import LOGGER, complaints, llama
from qvl.runtime.llama.header import check_text_file
from qvl.runtime.llama.repack import repacked_bytes, wants_repacking

_SIZE: Final = re.compile(r"(compute|output) buffer size = +([\d.]+) MiB")


@dataclass(frozen=True)
class TextMemory:
    """Bytes, on whatever device they lie.

    Attributes:
        weights: all tensors, as they lie in the file.
        repacked: copies of matrices, where they are faster in another order (`repack`).
        kv_cache: for every cell of the context.
        compute: the graph's nodes.
        output: rows of logits.
    """

    weights: int
    repacked: int
    kv_cache: int
    compute: int
    output: int

    @property
    def total(self) -> int:
        return self.weights + self.repacked + self.kv_cache + self.compute + self.output


def text_memory(path: str | Path, *, n_ctx: int, n_batch: int = 512, n_outputs_max: int = 1) -> TextMemory:
    """Memory of the decoder on the CPU with a context of n_ctx cells.

    Raises:
        GGUFError: not a text GGUF of a known architecture, or damaged.
        BackendError: llama.cpp refused it.
    """
    gguf = read_gguf(path)
    hparams = check_text_file(gguf)
    c = llama()
    model_params = c.llama_model_default_params()
    no_devices = (ctypes.c_void_p * 1)(None)
    model_params.devices = ctypes.cast(no_devices, ctypes.c_void_p)
    model_params.n_gpu_layers = 0
    model_params.no_alloc = True
    model_params.use_extra_bufts = wants_repacking(gguf)
    model_params.load_mode = c.LLAMA_LOAD_MODE_NONE
    params = c.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, max(n_batch, n_outputs_max), min(n_batch, 512)
    params.n_outputs_max = n_outputs_max
    params.kv_unified = True
    complaints()
    with _lines() as lines:
        model = c.llama_model_load_from_file(os.fsencode(gguf.path), model_params)
        context = c.llama_init_from_model(model, params) if model else None
        n_cells = c.llama_n_ctx(context) if context else 0
        if context:
            c.llama_free(context)
        if model:
            c.llama_model_free(model)
    found: dict[str, float] = {}
    for kind, size in _SIZE.findall("\n".join(lines)):
        found[kind] = found.get(kind, 0.0) + float(size)
    if not context or "compute" not in found:
        raise BackendError(f"{gguf.path}: llama.cpp cannot plan it: {complaints() or 'no reason given'}")
    return TextMemory(
        weights=sum(t.nbytes for t in gguf.tensors.values()),
        repacked=repacked_bytes(gguf),
        kv_cache=hparams.kv_bytes(n_cells),
        compute=int(found["compute"] * (1 << 20)),
        output=int(found.get("output", 0.0) * (1 << 20)),
    )


@contextmanager
def _lines() -> Iterator[list[str]]:
    """llama.cpp's log while the block runs, kept from everybody else."""
    lines: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler: Any = Collect()
    kept = LOGGER.handlers[:], LOGGER.level, LOGGER.propagate
    LOGGER.handlers, LOGGER.propagate = [handler], False
    LOGGER.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        LOGGER.handlers, LOGGER.propagate = kept[0], kept[2]
        LOGGER.setLevel(kept[1])
