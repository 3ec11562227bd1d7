"""The same model with its channels in another order: every function as before, other blocks for a quantizer.

What a rounding costs is partly luck, of which weights share a block. Copies of a model that differ in this
alone are several throws of the same die, and their mean is worth more than one.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from support.checkpoint import Style, write_weights

from qvl.convert.checkpoint import Checkpoint

# Tensor name to what its rows and its columns count; "" stays. Heads stay where they are, and what a query
# and a key have in common does; within a head values take another order, and so does what is made of them.
_ORDERS: Final = (
    (r"v_proj\.weight", "value", "hidden"),
    (r"v_proj\.bias", "value", ""),
    (r"embed_tokens\.weight|[qk]_proj\.weight", "", "hidden"),
    (r"layernorm\.weight|model\.norm\.weight", "hidden", ""),
    (r"o_proj\.weight", "hidden", "attended"),
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
Orders = dict[str, NDArray[np.intp]]


@dataclass(frozen=True)
class Reordered:
    """A copy of a model.

    Attributes:
        checkpoint: its folder.
        hidden: the old place of each channel of the decoder.
    """

    checkpoint: Path
    hidden: NDArray[np.intp]


def reorder(checkpoint: Path, out: Path, seed: int) -> Reordered:
    """A copy of a bfloat16 checkpoint in the order of a seed."""
    folder = out / "checkpoint"
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors", "train", "*.py*"))
    with Checkpoint(checkpoint) as source:
        held = {
            name: np.frombuffer(source.map(e.path), np.uint16, e.nbytes // 2, e.offset)
            .reshape(e.shape)
            .copy()
            for name, e in source.tensors.items()
        }
    config = json.loads((checkpoint / "config.json").read_text())
    groups = config["num_key_value_heads"], config["num_attention_heads"]
    orders = _orders(held, *groups, np.random.default_rng(seed))
    for name, values in held.items():
        rows, columns = next((r, c) for pattern, r, c in (*_ORDERS, ("", "", "")) if re.search(pattern, name))
        values = values[orders[rows]] if rows else values
        held[name] = values[:, orders[columns]] if columns else values
    write_weights(folder, held, Style(dtype="BF16"))
    return Reordered(folder, orders["hidden"])


def _orders(
    held: dict[str, NDArray[np.uint16]], kv_heads: int, heads: int, rng: np.random.Generator
) -> Orders:
    def size(end: str) -> int:
        return next(len(values) for name, values in held.items() if name.endswith(end))

    embed = rng.permutation(size("fc2.bias"))
    dim = size("v_proj.bias") // kv_heads
    values = [rng.permutation(dim) for _ in range(kv_heads)]
    shown = [values[head * kv_heads // heads] for head in range(heads)]
    return {
        "hidden": rng.permutation(size("model.norm.weight")),
        "inner": rng.permutation(size("gate_proj.weight")),
        "value": np.concatenate([order + i * dim for i, order in enumerate(values)]),
        "attended": np.concatenate([order + i * dim for i, order in enumerate(shown)]),
        "embed": embed,
        "four embed": np.concatenate([embed + i * len(embed) for i in range(4)]),
        "fc": rng.permutation(size("fc1.bias")),
        "merged": rng.permutation(size("merger.mlp.0.bias")),
    }
