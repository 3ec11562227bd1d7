"""Sums of squares and of pairwise products of every matrix multiplication's input, while a model runs.

The statistics of llama.cpp's tools/imatrix (`IMatrixCollector::collect_imatrix`), for the decoder and for the
image encoder. Inputs of experts are counted by the expert that a token was routed to. Unlike upstream's,
batches under 16 tokens count too: a question after a picture is one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from qvl.runtime.ggml import library as ggml
from qvl.runtime.ggml.imatrix import BLOCK, Entry

_Number = TypeVar("_Number", np.float32, np.int32)
_PRODUCT: Final = b"MUL_MAT"
_ROUTED: Final = b"MUL_MAT_ID"  # each token by the matrices of its experts
_LOOKED_UP: Final = "token_embd.weight"  # its rows are read as they are, so that no error may be compensated


class InputSums:
    """An observer of graphs that adds up squares, and products, of the inputs of named weights.

    Attributes:
        entries: by the weight's name, as the graph has it.
        paused: ignore all nodes.
    """

    def __init__(self, kept: Callable[[str], bool], *, products: bool = True) -> None:
        """
        Args:
            kept: tells by name which weights to observe.
            products: add up products of two inputs in one block of 256 too.
        """
        self.entries: dict[str, Entry] = {}
        self.paused = False
        self._with_products = products
        self._kept = lru_cache(maxsize=None)(kept)

    def wants(self, node: int) -> bool:
        if self.paused:
            return False
        struct = ggml.tensor(node)
        if not _operation(struct.op, node) or ggml.tensor(struct.src[1]).type != ggml.Type.F32:
            return False
        return self._kept(_name(struct.src[0]))

    def flush(self) -> dict[str, Entry]:
        """Return the sums so far and start again from zero."""
        entries, self.entries = self.entries, {}
        return entries

    def take(self, node: int) -> None:
        struct = ggml.tensor(node)
        name, values = _name(struct.src[0]), _array(struct.src[1], np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            if _operation(struct.op, node) == _ROUTED:
                n_experts = ggml.tensor(struct.src[0]).ne[2]
                entry = by_expert(values[0], _array(struct.src[2], np.int32)[0, 0], n_experts)
            else:
                rows = values.reshape(-1, values.shape[-1])
                entry = Entry(_squares(rows), len(rows), self._products(rows) if name != _LOOKED_UP else None)
        self.entries[name] = self.entries[name] + entry if name in self.entries else entry

    def _products(self, values: NDArray[np.float32]) -> NDArray[np.float32] | None:
        n_rows, n_in = values.shape
        if not self._with_products or n_in % BLOCK:
            return None
        blocks = values.reshape(n_rows, -1, BLOCK).transpose(1, 0, 2)
        return blocks.transpose(0, 2, 1) @ blocks


def by_expert(values: NDArray[np.float32], ids: NDArray[np.int32], n_experts: int) -> Entry:
    """Statistics of routed inputs, one row for each expert.

    Args:
        values: [n_tokens, 1 or n_used, n_in]; an input for each token (gate, up) or expert used (down).
        ids: [n_tokens, n_used], experts in [0, n_experts).
    """
    rows = np.broadcast_to(values, (*ids.shape, values.shape[-1]))
    sums = np.zeros((n_experts, values.shape[-1]))
    for expert in np.unique(ids):
        sums[expert] = _squares(rows[ids == expert])
    return Entry(sums, np.bincount(ids.ravel(), minlength=n_experts).astype(np.int64))


def in_decoder(name: str) -> bool:
    """Weights of the decoder's layers; llama-imatrix leaves the head out as well."""
    return name.startswith("blk.") and name.endswith(".weight")


def in_decoder_or_head(name: str) -> bool:
    """The head as well, which is the embedding's matrix where these are tied."""
    return in_decoder(name) or name in ("output.weight", "token_embd.weight")


def in_encoder(name: str) -> bool:
    """Weights of the image encoder that are ever quantized."""
    return name.startswith(("v.blk.", "v.deepstack.", "mm.", "resampler.")) and name.endswith(".weight")


def as_stored(
    entries: Mapping[str, Entry], stored: Callable[[str], tuple[Sequence[str], float]]
) -> dict[str, Entry]:
    """The encoder's statistics by the names of its file, and for activations of their true size.

    Args:
        stored: says of a weight of the graph its names in the file, and by how much its inputs are
            enlarged (`VisionEncoder.stored`).
    """
    result = {}
    for name, entry in entries.items():
        names, factor = stored(name)
        result.update(dict.fromkeys(names, entry / factor**2))
    return result


_names: Final[dict[int, bytes]] = {}


def _operation(op: int, node: int) -> bytes:
    """Name of a node's operation if it multiplies by weights, else b""."""
    if op not in _names:
        name: bytes = ggml.lib().ggml_op_desc(node)
        _names[op] = name if name in (_PRODUCT, _ROUTED) else b""
    return _names[op]


def _name(tensor: int) -> str:
    """A weight's own name: a scheduler calls its copy on another device `DEVICE#NAME#NUMBER`."""
    name: str = ggml.tensor(tensor).name.decode("utf-8", "replace")
    return name.split("#")[1] if name.count("#") >= 2 else name


def _squares(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    sums: NDArray[np.float32] = np.einsum("ij,ij->j", rows, rows)
    return sums.astype(np.float64)


def _array(pointer: int, dtype: type[_Number]) -> NDArray[_Number]:
    """A tensor's values in its four dimensions, last one first, whatever its strides and its device."""
    struct = ggml.tensor(pointer)
    data = np.empty(ggml.lib().ggml_nbytes(pointer), np.uint8)
    ggml.lib().ggml_backend_tensor_get(pointer, data.ctypes.data, 0, data.nbytes)
    return np.ndarray(tuple(reversed(struct.ne)), dtype, data.data, strides=tuple(reversed(struct.nb)))
