"""Qwen2-VL's vision tower as a ggml graph (arXiv 2409.12191, section 2.1).

    patches ─► patch embedding ─► depth × (attention, MLP) ─► layer norm ─► 2×2 merger ─► embeddings

Patches come in merge order: the four of each 2×2 group lie together, so that the merger is a reshape.
Attention is full within a segment, one temporal patch of one picture, and never crosses segments.
Reference: transformers, models/qwen2_vl/modeling_qwen2_vl.py, Qwen2VisionTransformerPretrainedModel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qvl.runtime.ggml import library as ggml
from qvl.runtime.ggml.devices import Device
from qvl.runtime.ggml.gguf import GGUFFile
from qvl.runtime.ggml.graph import Graph, Tensor
from qvl.runtime.ggml.weights import Array, Weights
from qvl.runtime.vision.grid import Grid, segments
from qvl.runtime.vision.layers import Layers
from qvl.runtime.vision.preprocess import Preprocessor
from qvl.runtime.vision.rope_2d import rotary_heads, rotary_positions
from qvl.runtime.vision.tensors import (
    Tensors,
    check_heads,
    check_merge,
    checked,
    join_qkv,
    patch_matrix,
    setting,
    split_qkv,
    tensor,
    vectors,
)
from qvl.runtime.vision.tower import PIXELS, Operations, TowerGraph

PREPROCESSOR: Final = Preprocessor()
FRAMES_PER_PATCH: Final = 2
CHANNELS: Final = 3
PATCH_KERNELS: Final = ("v.patch_embd.weight", "v.patch_embd.weight.1")
# gelu_quick(x) is silu(1.702 x) / 1.702: with everything in the blocks 1.702 times as large, which costs
# nothing (norms, biases and the patch embedding carry the factor), silu gives the next layer its input.
# ggml's gelu_quick rounds to float16 through a table; its silu is float32 and vectorized.
GELU_SCALE: Final = 1.702


@dataclass(frozen=True)
class VisionConfig:
    """The tower's dimensions.

    Attributes:
        n_embd: width of the tower.
        n_ff: width of the MLPs' inner layer.
        n_out: width of the embeddings, the decoder's n_embd.
        merge_size: patches merged along each side.
        eps: of the layer norms.
    """

    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_out: int
    patch_size: int
    merge_size: int
    eps: float

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def n_patch_in(self) -> int:
        """Values of a patch: 3 channels × 2 frames × patch_size²."""
        return CHANNELS * FRAMES_PER_PATCH * self.patch_size**2

    def operations(self, patches: int) -> Operations:
        """The work of encoding one picture of so many patches."""
        width = self.n_embd
        products = self.n_layer * (4 * width**2 + 2 * width * self.n_ff)
        group = width * self.merge_size**2
        merger = group * (group + self.n_out) / self.merge_size**2
        return Operations(2.0 * patches * (products + merger), 4.0 * self.n_layer * width * patches**2)

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape, rows first, of every tensor that the graph reads."""
        d, inner, p = self.n_embd, self.n_ff, self.patch_size
        yield "v.patch_embd.weight", (d, CHANNELS, p, p)
        yield "v.patch_embd.weight.1", (d, CHANNELS, p, p)
        for i in range(self.n_layer):
            b = f"v.blk.{i}."
            for name, rows, columns in (
                ("attn_q", d, d), ("attn_k", d, d), ("attn_v", d, d), ("attn_out", d, d),
                ("ffn_up", inner, d), ("ffn_down", d, inner),
            ):  # fmt: skip
                yield f"{b}{name}.weight", (rows, columns)
                yield f"{b}{name}.bias", (rows,)
            for name in ("ln1", "ln2"):
                yield f"{b}{name}.weight", (d,)
                yield f"{b}{name}.bias", (d,)
        merged = d * self.merge_size**2
        yield "v.post_ln.weight", (d,)
        yield "v.post_ln.bias", (d,)
        for name, rows in (("mm.0", merged), ("mm.2", self.n_out)):
            yield f"{name}.weight", (rows, merged)
            yield f"{name}.bias", (rows,)


def read_config(file: GGUFFile) -> VisionConfig:
    """The tower's dimensions, from the metadata and, where old files lie, from the shapes.

    Raises:
        GGUFError: a missing key, or an impossible value.
    """
    n_embd = setting(file, "embedding_length")
    n_head = setting(file, "attention.head_count")
    check_heads(file, n_embd, n_head)
    return VisionConfig(
        n_layer=setting(file, "block_count"),
        n_embd=n_embd,
        # feed_forward_length is the decoder's width in files of llama.cpp's converter
        n_ff=tensor(file, "v.blk.0.ffn_up.weight").n_elements // n_embd,
        n_head=n_head,
        n_out=tensor(file, "mm.2.weight").shape[0],
        patch_size=setting(file, "patch_size"),
        merge_size=check_merge(file, setting(file, "spatial_merge_size", 2)),
        eps=float(setting(file, "attention.layer_norm_epsilon", 1e-6)),
    )


def load(file: GGUFFile, config: VisionConfig, device: Device) -> Weights:
    """The tower's weights on a device: matrices as stored, vectors and patch embedding in float32.

    Where a block's q, k and v lie one after the other in one type they become a single `attn_qkv`,
    one product in place of three.

    Raises:
        GGUFError: tensors are missing or have another shape or type; the message names them.
        BackendError: the device has too little memory.
    """
    found = checked(file, _modern(dict(file.tensors), config), dict(config.shapes()), PATCH_KERNELS)
    patch = patch_matrix(file, *(found.pop(name) for name in PATCH_KERNELS))
    computed = {PATCH_KERNELS[0]: Array(patch * np.float32(GELU_SCALE))}
    for name, array in vectors(file, found).items():
        factor = GELU_SCALE if name.startswith("v.blk.") else 1.0
        computed[name] = Array(array.data * np.float32(factor))
    for i in range(config.n_layer):
        join_qkv(found, computed, f"v.blk.{i}.attn_")
    return Weights(file, found, computed, device)


def _modern(tensors: Tensors, config: VisionConfig) -> Tensors:
    """Old and other layouts made to look like the one that is written today."""
    for i in range(config.n_layer):
        up, down = f"v.blk.{i}.ffn_up", f"v.blk.{i}.ffn_down"
        if down + ".bias" in tensors and tensors[down + ".bias"].shape == (config.n_ff,) != (config.n_embd,):
            for part in (".weight", ".bias"):
                tensors[up + part], tensors[down + part] = tensors[down + part], tensors[up + part]
        split_qkv(tensors, f"v.blk.{i}.attn_")
    return tensors


def stored(name: str) -> tuple[Sequence[str], float]:
    """The names in the file of a weight of the graph, and the factor by which its inputs are enlarged."""
    factor = GELU_SCALE if name.startswith("v.blk.") else 1.0
    return split_names(name), factor


def split_names(name: str) -> Sequence[str]:
    """A weight's names in the file: q, k and v of a block can be one matrix in the graph."""
    if "attn_qkv" in name:
        return [name.replace("attn_qkv", f"attn_{x}") for x in "qkv"]
    return [name]


def inputs(config: VisionConfig, grids: Sequence[Grid]) -> dict[str, NDArray[Any]]:
    """The graph's inputs beside the pixels."""
    return {"positions": rotary_positions(grids, config.merge_size)}


def build(config: VisionConfig, weights: Weights, grids: Sequence[Grid], layers: Layers) -> TowerGraph:
    """The graph for pictures of these grids, packed one after the other.

    Args:
        weights: as `load` gives them, with GELU_SCALE folded in.
        layers: how its layers are made.
    """
    runs = segments(grids)
    g = Graph(max_nodes=64 + config.n_layer * layers.max_nodes(runs))
    n = sum(count * size for count, size in runs)
    pixels = g.input(ggml.Type.F32, config.n_patch_in, n)
    where = g.input(ggml.Type.I32, 4 * n)
    eps = config.eps * GELU_SCALE**2
    scale = 1 / (math.sqrt(config.head_dim) * GELU_SCALE**2)

    def attention(x: Tensor, block: str) -> Tensor:
        first = "attn_qkv" if f"{block}attn_qkv.weight" in weights else ""
        h = layers.norm(g, x, f"{block}ln1", eps, then=first and f"{block}{first}")
        q, k, v = rotary_heads(g, layers, weights, config.head_dim, h, block, where)
        seen = layers.attend(g, q, k, v, runs, scale, then=f"{block}attn_out")
        return layers.linear(g, seen, f"{block}attn_out", residual=x)

    def mlp(x: Tensor, block: str) -> Tensor:
        h = layers.norm(g, x, f"{block}ln2", eps, then=f"{block}ffn_up")
        h = layers.linear(g, h, f"{block}ffn_up", act="silu", then=f"{block}ffn_down")
        return layers.linear(g, h, f"{block}ffn_down", residual=x)

    x = g.weight(weights["v.patch_embd.weight"]) @ pixels
    for i in range(config.n_layer):
        block = f"v.blk.{i}."
        x = g.name(mlp(attention(x, block), block), f"@{i + 1}")
    merge = config.merge_size**2
    x = layers.norm(g, x, "v.post_ln", eps, then="mm.0").reshape(config.n_embd * merge, n // merge)
    x = layers.linear(g, layers.linear(g, x, "mm.0", act="gelu", then="mm.2"), "mm.2")
    return TowerGraph(g, {PIXELS: pixels, "positions": where}, g.output(x))
