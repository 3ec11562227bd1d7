"""Importance matrices: for each column of a weight matrix, how large its input is on real prompts.

A quantizer weighs the errors of a row by these. The file is llama.cpp's GGUF form (tools/imatrix, and
common/imatrix-loader.cpp which reads it): for each matrix `NAME.in_sum2`, the sums of its inputs' squares,
and `NAME.counts`, the number of inputs summed. A stack of experts has a row of each for every expert.

Our files also hold `NAME.in_products`, which llama.cpp's loader ignores: the sums of products of any two
inputs within one block of 256, the block of the K-quants. qvl.convert.feedback uses them to compensate the
rounding error of one weight in the weights after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qvl.runtime.errors import GGUFError, shown
from qvl.runtime.ggml.gguf import GGUFFile, TensorInfo, read_gguf
from qvl.runtime.ggml.gguf_writer import Value, write_gguf
from qvl.runtime.ggml.library import Type

KIND: Final = "imatrix"  # general.type
SUMS, COUNTS, PRODUCTS = ".in_sum2", ".counts", ".in_products"
BLOCK: Final = 256
DATASETS, CHUNKS, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
_HINT: Final = "make one with qvl imatrix, or with llama-imatrix --output-format gguf"


@dataclass(frozen=True)
class Entry:
    """Statistics of the inputs of one matrix, or of a stack of experts.

    Attributes:
        sums: float64 [n_in] or [n_experts, n_in], sums of squares.
        count: inputs summed; int64 [n_experts] for a stack, 0 for an expert that no token was routed to.
        products: float32 [n_in / BLOCK, BLOCK, BLOCK], sums of products within each block; None where they
            were not counted, for experts, and where n_in is not a multiple of BLOCK.
    """

    sums: NDArray[np.float64]
    count: int | NDArray[np.int64]
    products: NDArray[np.float32] | None = None

    def __add__(self, other: Entry) -> Entry:
        both = None if self.products is None or other.products is None else self.products + other.products
        return Entry(self.sums + other.sums, self.count + other.count, both)

    def __truediv__(self, scale: float) -> Entry:
        """Statistics of the same inputs divided by the square root of `scale`."""
        products = None if self.products is None else self.products / np.float32(scale)
        return Entry(self.sums / scale, self.count, products)


@dataclass(frozen=True)
class Imatrix:
    """Contents of an importance matrix file.

    Attributes:
        entries: by the name of the weight.
        datasets: names of the calibration data, for people.
        chunks: number of prompts, or pieces of text.
        chunk_size: tokens of a piece of text.
        extra: other metadata, strings and numbers.
    """

    entries: Mapping[str, Entry]
    datasets: tuple[str, ...] = ()
    chunks: int = 0
    chunk_size: int = 512
    extra: Mapping[str, str | int] = field(default_factory=dict)

    def importance(self) -> dict[str, NDArray[np.float32]]:
        """Mean squares by name, float32 [n_in] or [n_experts, n_in], as llama-quantize computes them.

        An expert (or matrix) without inputs has ones (tools/quantize/quantize.cpp, `load_imatrix`).
        """
        return {name: _mean_squares(entry) for name, entry in self.entries.items()}

    @property
    def partial(self) -> dict[str, float]:
        """Share of experts that saw inputs, for the stacks in which some saw none."""
        shares = {name: float(np.mean(np.asarray(entry.count) > 0)) for name, entry in self.entries.items()}
        return {name: share for name, share in shares.items() if share < 1}


def _mean_squares(entry: Entry) -> NDArray[np.float32]:
    counts = np.asarray(entry.count, np.float32)[..., None]
    ones = np.ones(entry.sums.shape, np.float32)
    return np.divide(entry.sums.astype(np.float32), counts, out=ones, where=counts > 0)


def write_imatrix(path: Path, imatrix: Imatrix) -> None:
    """Write the file atomically.

    Raises:
        OutputError: the disk is full, or the folder cannot be written.
    """
    metadata: dict[str, Value] = {
        "general.type": KIND,
        DATASETS: list(imatrix.datasets),
        CHUNKS: imatrix.chunks,
        CHUNK_SIZE: imatrix.chunk_size,
        **imatrix.extra,
    }
    tensors = []
    for name in sorted(imatrix.entries):
        entry = imatrix.entries[name]
        rows = None if entry.products is None else entry.products.reshape(-1, BLOCK)
        counts = np.reshape(entry.count, (-1, 1)) if np.ndim(entry.count) else np.array([entry.count])
        parts = ((SUMS, entry.sums), (COUNTS, counts), (PRODUCTS, rows))
        for suffix, values in parts:
            if values is None:
                continue
            data = np.ascontiguousarray(values, np.float32)
            info = TensorInfo(name + suffix, data.shape, Type.F32, 0, data.nbytes)
            tensors.append((info, data.data.cast("B")))
    write_gguf(path, metadata, tensors)


def read_imatrix(path: str | Path) -> Imatrix:
    """Read a file of `qvl imatrix` or llama-imatrix; products are mapped, not read.

    Raises:
        GGUFError: damaged, another kind of file (llama.cpp's old .dat form too), values that are not
            finite, or negative.
    """
    try:
        file = read_gguf(path)
    except GGUFError as error:
        raise GGUFError(str(error), hint=_HINT) from error
    names = {n.removesuffix(SUMS) for n in file.tensors if n.endswith(SUMS)}
    counted = {n.removesuffix(COUNTS) for n in file.tensors if n.endswith(COUNTS)}
    if not names or names != counted:
        found = "nothing" if not names | counted else f"{len(names)} sums and {len(counted)} counts"
        raise GGUFError(f"{path}: not an importance matrix: has {found} of inputs", hint=_HINT)
    entries = {}
    for name in sorted(names):
        sums, counts = (_values(file.path, file.tensors[name + suffix]) for suffix in (SUMS, COUNTS))
        if len(sums) == 0 or len(counts) == 0 or len(sums) % len(counts):
            raise GGUFError(f"{path}: {name} has {len(sums)} sums for {len(counts)} counts", hint=_HINT)
        if not (_are_sums(sums) and _are_sums(counts)):
            raise GGUFError(f"{path}: {name} has sums that are negative or not finite", hint=_HINT)
        entries[name] = _entry(file, name, sums.astype(np.float64), np.rint(counts).astype(np.int64))
    return Imatrix(
        entries,
        tuple(_field(file, DATASETS, list, [])),
        _field(file, CHUNKS, int, 0),
        _field(file, CHUNK_SIZE, int, 0),
        {key: _field(file, key, (str, int), 0) for key in file.metadata if key.startswith("qvl.")},
    )


def _are_sums(values: NDArray[np.float32]) -> bool:
    return bool(np.isfinite(values).all() and values.min() >= 0)


def _entry(file: GGUFFile, name: str, sums: NDArray[np.float64], counts: NDArray[np.int64]) -> Entry:
    if len(counts) > 1:
        return Entry(sums.reshape(len(counts), -1), counts)
    return Entry(sums, int(counts[0]), _products(file.path, file.tensors.get(name + PRODUCTS), len(sums)))


def _field(file: GGUFFile, key: str, kinds: Any, default: Any) -> Any:
    """A value of the header, checked for its kind; lists must hold strings."""
    value = file.metadata.get(key, default)
    whole = not isinstance(value, list) or all(isinstance(item, str) for item in value)
    if not isinstance(value, kinds) or isinstance(value, bool) or not whole:
        raise GGUFError(f"{file.path}: {key} is {shown(value)}, which no importance matrix has", hint=_HINT)
    return value


def _products(path: Path, info: TensorInfo | None, n_in: int) -> NDArray[np.float32] | None:
    if info is None:
        return None
    if info.type is not Type.F32 or info.shape != (n_in, BLOCK) or n_in % BLOCK:
        raise GGUFError(
            f"{path}: {info.name} is {info.type.name} of {info.shape}, expected F32 of {(n_in, BLOCK)}",
            hint=_HINT,
        )
    return np.memmap(path, np.float32, "r", info.offset, (n_in // BLOCK, BLOCK, BLOCK))


def _values(path: Path, info: TensorInfo) -> NDArray[np.float32]:
    if info.type is not Type.F32:
        raise GGUFError(f"{path}: {info.name} has type {info.type.name}, expected F32", hint=_HINT)
    return np.fromfile(path, np.float32, info.n_elements, offset=info.offset)
