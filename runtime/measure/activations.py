"""Sums of squares of every matrix product's input, and of products of two, while a model runs.

What llama.cpp's tools/imatrix collects (`IMatrixCollector::collect_imatrix`), for the decoder and for the
image encoder alike. Small batches count too: a question after a picture is a small batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from qvl.runtime.ggml import library as ggml
from qvl.runtime.ggml.imatrix import BLOCK, Entry

_PRODUCT: Final = b"MUL_MAT"
_LOOKED_UP: Final = "token_embd.weight"  # where this is the head too, its weights must be right by themselves


class InputSums:
    """An observer of graphs that adds up squares, and products, of the inputs of named weights.

    Attributes:
        entries: by the weight's name, as the graph has it.
        paused: see nothing for now.
    """

    def __init__(self, kept: Callable[[str], bool], *, products: bool = True) -> None:
        """kept: which weights, by name. products: of two inputs in one block of 256 too."""
        self.entries: dict[str, Entry] = {}
        self.paused = False
        self._with_products = products
        self._kept = lru_cache(maxsize=None)(kept)

    def wants(self, node: int) -> bool:
        if self.paused:
            return False
        struct = ggml.tensor(node)
        if not _is_product(struct.op, node) or ggml.tensor(struct.src[1]).type != ggml.Type.F32:
            return False
        return self._kept(_name(struct.src[0]))

    def flush(self) -> dict[str, Entry]:
        """What has been added up, which begins anew."""
        entries, self.entries = self.entries, {}
        return entries

    def take(self, node: int) -> None:
        source = ggml.tensor(node).src
        name, values = _name(source[0]), _rows(source[1])
        with np.errstate(over="ignore", invalid="ignore"):
            squares = np.einsum("ij,ij->j", values, values).astype(np.float64)
            entry = Entry(squares, len(values), self._products(values) if name != _LOOKED_UP else None)
        self.entries[name] = self.entries[name] + entry if name in self.entries else entry

    def _products(self, values: NDArray[np.float32]) -> NDArray[np.float32] | None:
        n_rows, n_in = values.shape
        if not self._with_products or n_in % BLOCK:
            return None
        blocks = values.reshape(n_rows, -1, BLOCK).transpose(1, 0, 2)
        return blocks.transpose(0, 2, 1) @ blocks


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


_codes: Final[dict[int, bool]] = {}


def _is_product(op: int, node: int) -> bool:
    if op not in _codes:
        _codes[op] = ggml.lib().ggml_op_desc(node) == _PRODUCT
    return _codes[op]


def _name(tensor: int) -> str:
    """A weight's own name: a scheduler calls its copy on another device `DEVICE#NAME#NUMBER`."""
    name: str = ggml.tensor(tensor).name.decode("utf-8", "replace")
    return name.split("#")[1] if name.count("#") >= 2 else name


def _rows(pointer: int) -> NDArray[np.float32]:
    """A tensor's values as [rows, columns], whatever its strides and wherever it lies."""
    struct = ggml.tensor(pointer)
    data = np.empty(ggml.lib().ggml_nbytes(pointer), np.uint8)
    ggml.lib().ggml_backend_tensor_get(pointer, data.ctypes.data, 0, data.nbytes)
    shape, strides = tuple(reversed(struct.ne)), tuple(reversed(struct.nb))
    values = np.ndarray(shape, np.float32, data.data, strides=strides)
    return values.reshape(-1, shape[-1])
