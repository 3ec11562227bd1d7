"""The same model with its channels in another order: every function as before, other blocks for a quantizer.

What a rounding costs is partly luck, of which weights share a block. Copies of a model that differ in this
alone are several throws of the same die, and their mean is worth more than one.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from support.checkpoint import Style, write_weights

from qvl.convert.checkpoint import Checkpoint
from qvl.runtime.ggml.imatrix import Entry, Imatrix, read_imatrix, write_imatrix

# Tensor name to what its rows and its columns count; "" stays. Heads stay where they are.
_ORDERS: Final = (
    (r"embed_tokens\.weight|[qkv]_proj\.weight", "", "hidden"),
    (r"layernorm\.weight|model\.norm\.weight", "hidden", ""),
    (r"o_proj\.weight", "hidden", ""),
    (r"(gate|up)_proj\.weight", "inner", "hidden"),
    (r"down_proj\.weight", "hidden", "inner"),
    (r"patch_embed\.proj\.weight|norm[12]\.|ln_q\.|attn\.proj\.|fc2\.bias", "embed", ""),
    (r"qkv\.weight", "", "embed"),
    (r"fc1\.weight", "fc", "embed"),
    (r"fc1\.bias", "fc", ""),
    (r"fc2\.weight", "embed", "fc"),
    (r"merger\.mlp\.0\.weight", "merged", "four embed"),
    (r"merger\.mlp\.0\.bias", "merged", ""),
    (r"merger\.mlp\.2\.weight", "hidden", "merged"),
    (r"merger\.mlp\.2\.bias", "hidden", ""),
)
# The same for the inputs of a matrix in the GGUF files.
_INPUTS: Final = (
    (r"^blk\..*(attn_[qkv]|ffn_gate|ffn_up)\.", "hidden"),
    (r"^blk\..*ffn_down\.", "inner"),
    (r"^v\..*attn_(qkv|[qkv])\.", "embed"),
    (r"^v\..*ffn_up\.", "embed"),
    (r"^v\..*ffn_down\.", "fc"),
    (r"^mm\.0\.", "four embed"),
    (r"^mm\.2\.", "merged"),
)
Orders = dict[str, NDArray[np.intp]]


@dataclass(frozen=True)
class Reordered:
    """A copy of a model.

    Attributes:
        checkpoint: its folder.
        matrix: its importance matrix.
        hidden: the old place of each channel of the decoder.
    """

    checkpoint: Path
    matrix: Path
    hidden: NDArray[np.intp]


def reorder(checkpoint: Path, matrix: Path, out: Path, seed: int) -> Reordered:
    """A copy of a bfloat16 checkpoint and of its importance matrix, in the order of a seed."""
    folder, copied = out / "checkpoint", out / "imatrix.gguf"
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors", "train", "*.py*"))
    with Checkpoint(checkpoint) as source:
        held = {
            name: np.frombuffer(source.map(e.path), np.uint16, e.nbytes // 2, e.offset)
            .reshape(e.shape)
            .copy()
            for name, e in source.tensors.items()
        }
    orders = _orders(held, np.random.default_rng(seed))
    for name, values in held.items():
        rows, columns = next((r, c) for pattern, r, c in (*_ORDERS, ("", "", "")) if re.search(pattern, name))
        values = values[orders[rows]] if rows else values
        held[name] = values[:, orders[columns]] if columns else values
    write_weights(folder, held, Style(dtype="BF16"))
    found = read_imatrix(matrix)
    entries = {
        name: Entry(entry.sums[_of(name, orders, len(entry.sums))], entry.count)
        for name, entry in found.entries.items()
    }
    write_imatrix(copied, Imatrix(entries, found.datasets, found.chunks, found.chunk_size))
    return Reordered(folder, copied, orders["hidden"])


def _orders(held: dict[str, NDArray[np.uint16]], rng: np.random.Generator) -> Orders:
    def size(end: str) -> int:
        return next(len(values) for name, values in held.items() if name.endswith(end))

    embed = rng.permutation(size("fc2.bias"))
    return {
        "hidden": rng.permutation(size("model.norm.weight")),
        "inner": rng.permutation(size("gate_proj.weight")),
        "embed": embed,
        "four embed": np.concatenate([embed + i * len(embed) for i in range(4)]),
        "fc": rng.permutation(size("fc1.bias")),
        "merged": rng.permutation(size("merger.mlp.0.bias")),
    }


def _of(name: str, orders: Orders, n: int) -> NDArray[np.intp]:
    return next((orders[key] for pattern, key in _INPUTS if re.search(pattern, name)), np.arange(n))
