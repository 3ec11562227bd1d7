"""Converts and quantizes rows of a checkpoint into a GGUF file, on all cores and in little memory.

A tensor is cut into chunks of whole rows. A worker takes a chunk from the mapped shard to float32 (libggml's
converters), quantizes it (`ggml_quantize_chunk`, or our own K-quants, which give the same bytes faster),
compensates rounding errors where products of inputs are at hand (qvl.convert.feedback), and writes it at its
offset. ctypes releases the interpreter's lock for these calls, so that threads suffice. Pages that were read
are dropped from this process along the way.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from qvl.convert.checkpoint import Checkpoint
from qvl.convert.entries import ITEM_SIZE, TensorEntry
from qvl.convert.feedback import FEEDBACK, Factors, factors, feed_back
from qvl.convert.native import kquants
from qvl.convert.recipe import FLOATS, Planned
from qvl.convert.rows import Array, chunks
from qvl.runtime.ggml import library as ggml
from qvl.runtime.ggml.library import Type
from qvl.runtime.resources import usable_cores

CHUNK: Final = 1 << 18  # elements: a megabyte of float32, near the size of a core's cache
RELEASE: Final = 32 << 20  # source bytes between two drops: a fault maps more pages than it is asked for
SOURCE_TYPES: Final[dict[str, Type]] = {"F32": Type.F32, "F16": Type.F16, "BF16": Type.BF16}
F16_MAX: Final = 65504.0

StepProgress = Callable[[int, int, str], None]
"""Called from the caller's thread with source bytes done, source bytes in all, and the tensor's name."""


class Sink(Protocol):
    """Destination of chunks; called from several threads."""

    def write_at(self, offset: int, data: memoryview) -> None: ...


@dataclass(frozen=True)
class TensorJob:
    """One tensor to write.

    Attributes:
        entry: the source.
        offset: of the tensor's first byte in the sink.
        importance: float32 [n_per_row], or [n_experts, n_per_row], or None.
        products: float32 [n_per_row / 256, 256, 256] of inputs (`Entry.products`), or None.
    """

    planned: Planned
    entry: TensorEntry
    sink: Sink
    offset: int
    importance: npt.NDArray[np.float32] | None = None
    products: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Odd:
    """Values that a file cannot carry well.

    Attributes:
        not_finite: NaN or infinite weights in the source.
        too_large: finite weights beyond F16's range, where the type written cannot hold them.
    """

    not_finite: int = 0
    too_large: int = 0

    def __add__(self, other: Odd) -> Odd:
        return Odd(self.not_finite + other.not_finite, self.too_large + other.too_large)

    def __bool__(self) -> bool:
        return bool(self.not_finite or self.too_large)


@dataclass(frozen=True)
class _Chunk:
    job: TensorJob
    part: Array
    row: int
    factors: Factors | None


def write_tensors(
    checkpoint: Checkpoint,
    jobs: Sequence[TensorJob],
    *,
    threads: int | None = None,
    progress: StepProgress | None = None,
) -> Mapping[str, Odd]:
    """Convert, quantize and write every job's tensor.

    Args:
        threads: workers; one for each logical core that this process may use unless given.

    Returns:
        Names of tensors with values that the file cannot carry, and their counts.

    Raises:
        OSError: from the sink, or from reading the checkpoint. Anything that `progress` raises.
        GGUFError: products that no inputs have.
    """
    n_threads = threads or usable_cores()
    done, total = 0, sum(_source_bytes(job) for job in jobs)
    odd: dict[str, Odd] = {}
    worker = _Worker()
    pending: deque[tuple[_Chunk, Future[Odd]]] = deque()
    pool = ThreadPoolExecutor(n_threads, thread_name_prefix="quantize")

    def collect() -> None:
        nonlocal done
        chunk, future = pending.popleft()
        found, name = future.result(), chunk.job.planned.tensor.name
        if found:
            odd[name] = odd.get(name, Odd()) + found
        if (done + chunk.part.nbytes) // RELEASE > done // RELEASE:
            checkpoint.release()
        done += chunk.part.nbytes
        if progress is not None:
            progress(done, total, name)

    try:
        for chunk in _chunks(checkpoint, jobs):
            pending.append((chunk, pool.submit(worker, chunk)))
            # A short queue keeps every worker busy, and interrupts fast.
            if len(pending) > 4 * n_threads:
                collect()
        while pending:
            collect()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        pending.clear()  # views of the maps go with it
    return odd


def _source_bytes(job: TensorJob) -> int:
    return job.planned.tensor.n_elements * ITEM_SIZE[job.entry.dtype]


def _chunks(checkpoint: Checkpoint, jobs: Iterable[TensorJob]) -> Iterator[_Chunk]:
    for job in jobs:
        view, found = source_rows(checkpoint, job), None
        if job.products is not None and job.planned.type in FEEDBACK:
            found = factors(job.products, job.planned.tensor.name)
        apart = job.importance is not None and job.importance.ndim > 1
        for row, part in chunks(view, CHUNK, apart=apart):
            yield _Chunk(job, part, row, found)


def source_rows(checkpoint: Checkpoint, job: TensorJob) -> Array:
    """The job's source as an array of the tensor's shape, of float32, float64 or 16-bit patterns: nothing
    is read."""
    tensor = job.planned.tensor
    view = tensor.view(checkpoint.array(job.entry))
    if view.size != tensor.n_elements or (len(tensor.shape) > 1 and view.shape[-1] != tensor.n_per_row):
        raise ValueError(f"{tensor.name}: its view has shape {view.shape}, expected {tensor.shape}")
    return view if len(tensor.shape) > 1 else view.reshape(-1)


class _Worker:
    """Converts, quantizes and writes one chunk; buffers are kept by thread."""

    def __init__(self) -> None:
        self.lib = ggml.lib()
        self.fast = kquants()
        self.local = threading.local()

    def __call__(self, chunk: _Chunk) -> Odd:
        job, kind = chunk.job, chunk.job.planned.type
        tensor, source = job.planned.tensor, SOURCE_TYPES.get(job.entry.dtype)
        rows = np.require(chunk.part, requirements=("C", "A")).reshape(-1, tensor.n_per_row)
        values = self.to_float32(rows, source)
        if tensor.values is not None:
            values, source = np.ascontiguousarray(tensor.values(values, chunk.row), np.float32), Type.F32
            rows = values
        odd = _odd(values)
        if odd.not_finite and kind not in FLOATS:
            # One NaN would spoil its whole block, and some quantizers abort on it.
            values = np.nan_to_num(values, copy=True, nan=0.0, posinf=0.0, neginf=0.0)
        if source is kind:
            data = rows.data.cast("B")
        else:
            data = self.quantize(values, kind, importance_of(job, chunk.row))
            if chunk.factors is not None:
                feed_back(kind, values, data, chunk.factors)
        if odd.too_large and self.holds(data, kind):
            odd = Odd(odd.not_finite)
        n_rows = rows.shape[0]
        job.sink.write_at(job.offset + chunk.row * (len(data) // n_rows), data)
        return odd

    def buffer(self, name: str, nbytes: int) -> npt.NDArray[np.uint8]:
        held: npt.NDArray[np.uint8] | None = getattr(self.local, name, None)
        if held is None or held.nbytes < nbytes:
            held = np.empty(nbytes, np.uint8)
            setattr(self.local, name, held)
        return held[:nbytes]

    def to_float32(self, rows: Array, kind: Type | None) -> npt.NDArray[np.float32]:
        if kind is Type.F32:
            return rows
        if kind is None:  # F64
            return rows.astype(np.float32)
        values = self.buffer("values", rows.size * 4).view(np.float32)
        convert = self.lib.ggml_bf16_to_fp32_row if kind is Type.BF16 else self.lib.ggml_fp16_to_fp32_row
        convert(rows.ctypes.data, values.ctypes.data, rows.size)
        return values.reshape(rows.shape)

    def quantize(
        self, values: npt.NDArray[np.float32], kind: Type, importance: npt.NDArray[np.float32] | None
    ) -> memoryview:
        n_rows, n_per_row = values.shape
        data = self.buffer("data", n_rows * ggml.row_size(kind, n_per_row))
        if self.fast is not None and kind in self.fast.types:
            self.fast.quantize(kind, values, data, importance)
            return data.data
        weights = None if importance is None else importance.ctypes.data
        self.lib.ggml_quantize_chunk(
            int(kind), values.ctypes.data, data.ctypes.data, 0, n_rows, n_per_row, weights
        )
        return data.data

    def holds(self, data: memoryview, kind: Type) -> bool:
        """True if the written rows are free of infinite values and scales."""
        if kind in (Type.F32, Type.BF16):
            return True
        held = np.frombuffer(data, np.uint8)
        return bool(self.lib.ggml_validate_row_data(int(kind), held.ctypes.data, held.nbytes))


def importance_of(job: TensorJob, row: int) -> npt.NDArray[np.float32] | None:
    """The importance of a row's columns: one vector for a matrix, one for each expert of a stack."""
    if job.importance is None or job.importance.ndim == 1:
        return job.importance
    vector: npt.NDArray[np.float32] = job.importance[row // job.planned.tensor.shape[-2]]
    return vector


def _odd(values: npt.NDArray[np.float32]) -> Odd:
    # Two quick passes for the usual case: extremes are NaN or infinite where any value is.
    low, high = values.min(), values.max()
    if low >= -F16_MAX and high <= F16_MAX:
        return Odd()
    finite = np.isfinite(values)
    return Odd(
        not_finite=int(values.size - np.count_nonzero(finite)),
        too_large=int(np.count_nonzero(finite & (np.abs(values) > F16_MAX))),
    )
