"""Qwen-VL's vision tower as a ggml graph (arXiv 2308.12966, section 2.1).

    448×448 ─► patches + learned positions ─► layer norm ─► depth × (attention, MLP) ─► resampler ─► 256 rows

A ViT-bigG (OpenCLIP) without class token, and a resampler: one cross-attention of 256 learned queries, a
16×16 grid, to all patches, with 2D positions on queries and keys. Both tables of positions are for 16×16 and
are resized to the grid of patches at load. Patches come in merge order, as in the other families, and the
tables are put into the same order, so that the result does not depend on it.
The file's names and metadata: docs/qwen-vl-gguf.md. Facts: vLLM, model_executor/models/qwen_vl.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qvl.runtime.errors import GGUFError
from qvl.runtime.families.qwen2_vl.tower import CHANNELS, split_names
from qvl.runtime.ggml import library as ggml
from qvl.runtime.ggml.devices import Device
from qvl.runtime.ggml.gguf import GGUFFile
from qvl.runtime.ggml.graph import Graph, Tensor
from qvl.runtime.ggml.weights import Array, Weights
from qvl.runtime.vision.attention import joined
from qvl.runtime.vision.grid import Grid, segments
from qvl.runtime.vision.header import HINT, value
from qvl.runtime.vision.layers import Layers
from qvl.runtime.vision.preprocess import Preprocessor
from qvl.runtime.vision.tensors import (
    check_heads,
    checked,
    float32,
    join_qkv,
    patch_matrix,
    setting,
    split_qkv,
    tensor,
    vectors,
)
from qvl.runtime.vision.tower import PIXELS, Operations, TowerGraph

SIDE: Final = 448
PREPROCESSOR: Final = Preprocessor(
    temporal_patch_size=1, min_pixels=SIDE * SIDE, max_pixels=SIDE * SIDE, side=SIDE
)
PATCH: Final = "v.patch_embd.weight"
TABLE: Final = "v.position_embd.weight"
QUERY: Final = "resampler.query"
KEY_TABLE: Final = "resampler.pos_embed_k"
QUERY_TABLE: Final = "resampler.pos_embed_q"  # the same as stored, in the graph only
CUBIC: Final = -0.75  # coefficient of the cubic kernel (PyTorch, UpSample.h, get_cubic_upsample_coefficients)


@dataclass(frozen=True)
class VisionConfig:
    """The tower's dimensions.

    Attributes:
        n_embd: width of the ViT.
        n_ff: width of the MLPs' inner layer.
        n_out: width of the resampler and of the embeddings, the decoder's n_embd.
        n_out_head: heads of the resampler.
        grid_side: patches along each side of a picture.
        table_side: learned positions along each side.
        query_side: queries along each side.
        eps: of the layer norms.
    """

    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_out: int
    n_out_head: int
    patch_size: int
    grid_side: int
    table_side: int
    query_side: int
    eps: float

    @property
    def merge_size(self) -> int:
        """Patches along each side for one query."""
        return self.grid_side // self.query_side

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def n_patch_in(self) -> int:
        """Values of a patch: 3 channels × patch_size²."""
        return CHANNELS * self.patch_size**2

    def operations(self, patches: int) -> Operations:
        """The work of encoding so many patches, which are those of whole pictures."""
        width, out, queries = self.n_embd, self.n_out, self.merge_size**-2
        products = self.n_layer * (4 * width**2 + 2 * width * self.n_ff)
        resampler = width * out + 2 * out**2 + 3 * queries * out**2
        seen = self.grid_side**2
        attention = self.n_layer * width + queries * out
        return Operations(2.0 * patches * (products + resampler), 4.0 * patches * seen * attention)

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape, rows first, of every tensor that the graph reads."""
        d, out, p = self.n_embd, self.n_out, self.patch_size
        yield PATCH, (d, CHANNELS, p, p)
        yield TABLE, (self.table_side**2, d)
        yield QUERY, (self.query_side**2, out)
        yield KEY_TABLE, (self.query_side**2, out)
        yield "resampler.kv.weight", (out, d)
        yield "resampler.proj.weight", (out, out)
        matrices = [(f"resampler.attn.{name}", out, out) for name in ("q", "k", "v", "out")]
        norms = [("v.pre_ln", d), *((f"resampler.{name}", out) for name in ("ln_q", "ln_kv", "ln_post"))]
        for i in range(self.n_layer):
            b = f"v.blk.{i}."
            matrices += [(f"{b}attn_{name}", d, d) for name in ("q", "k", "v", "out")]
            matrices += [(f"{b}ffn_up", self.n_ff, d), (f"{b}ffn_down", d, self.n_ff)]
            norms += [(f"{b}ln1", d), (f"{b}ln2", d)]
        for name, rows, columns in matrices:
            yield f"{name}.weight", (rows, columns)
            yield f"{name}.bias", (rows,)
        for name, width in norms:
            yield f"{name}.weight", (width,)
            yield f"{name}.bias", (width,)


def read_config(file: GGUFFile) -> VisionConfig:
    """The tower's dimensions from the metadata and the shapes.

    Raises:
        GGUFError: a missing key, or an impossible value.
    """
    n_embd = setting(file, "embedding_length")
    n_head = setting(file, "attention.head_count")
    n_out = tensor(file, "resampler.proj.weight").shape[0]
    n_out_head = value(file.metadata, "clip.vision.projector.head_count", path=file.path)
    check_heads(file, n_embd, n_head)
    check_heads(file, n_out, n_out_head)
    size, patch_size = setting(file, "image_size", SIDE), setting(file, "patch_size")
    query_side = value(file.metadata, "clip.vision.projector.query_side", path=file.path)
    grid_side = size // patch_size
    if size % patch_size or grid_side != PREPROCESSOR.merge_size * query_side:
        raise GGUFError(
            f"{file.path}: pictures of {size}x{size} pixels, patches of {patch_size} and {query_side}x"
            f"{query_side} queries, expected twice as many patches as queries along each side",
            hint=HINT,
        )
    n_positions = tensor(file, TABLE).shape[0]
    table_side = math.isqrt(n_positions)
    if table_side**2 != n_positions or table_side < 1:
        raise GGUFError(f"{file.path}: {TABLE} has {n_positions} rows, expected a square number", hint=HINT)
    return VisionConfig(
        n_layer=setting(file, "block_count"),
        n_embd=n_embd,
        n_ff=tensor(file, "v.blk.0.ffn_up.weight").shape[0],
        n_head=n_head,
        n_out=n_out,
        n_out_head=n_out_head,
        patch_size=patch_size,
        grid_side=grid_side,
        table_side=table_side,
        query_side=query_side,
        eps=float(setting(file, "attention.layer_norm_epsilon", 1e-6)),
    )


def load(file: GGUFFile, config: VisionConfig, device: Device) -> Weights:
    """The tower's weights on a device; tables of positions resized to the grid of patches.

    Raises:
        GGUFError: tensors are missing or have another shape or type; the message names them.
        BackendError: the device has too little memory.
    """
    tensors = dict(file.tensors)
    for i in range(config.n_layer):
        split_qkv(tensors, f"v.blk.{i}.attn_")
    plain = (PATCH, TABLE, QUERY, KEY_TABLE)
    found = checked(file, tensors, dict(config.shapes()), plain)
    patch = patch_matrix(file, found.pop(PATCH))
    table, query, of_queries = (float32(file, found.pop(name)) for name in plain[1:])
    computed = {
        PATCH: Array(patch),
        TABLE: Array(resized(table, config.grid_side, config.merge_size)),
        QUERY: Array(query),
        QUERY_TABLE: Array(of_queries),
        KEY_TABLE: Array(resized(of_queries, config.grid_side, config.merge_size)),
        **vectors(file, found),
    }
    for i in range(config.n_layer):
        join_qkv(found, computed, f"v.blk.{i}.attn_")
    return Weights(file, found, computed, device)


def resized(table: NDArray[np.float32], side: int, merge_size: int) -> NDArray[np.float32]:
    """A square table of positions [n², d] for a grid of side × side patches, in merge order.

    Equal to `torch.nn.functional.interpolate(…, mode="bicubic", align_corners=False)`.
    """
    n = math.isqrt(len(table))
    rows = _cubic(n, side)
    grid = np.einsum("yi,xj,ijd->yxd", rows, rows, table.reshape(n, n, -1).astype(np.float64), optimize=True)
    blocks = grid.reshape(side // merge_size, merge_size, side // merge_size, merge_size, -1)
    ordered: NDArray[np.float64] = blocks.transpose(0, 2, 1, 3, 4).reshape(side * side, -1)
    return ordered.astype(np.float32)


def _cubic(n: int, side: int) -> NDArray[np.float64]:
    """The share, [side, n], of each of n values in each of side values interpolated between them."""
    place = (np.arange(side) + 0.5) * n / side - 0.5
    shares = np.zeros((side, n))
    for tap in range(-1, 3):
        index = np.floor(place) + tap
        x = np.abs(place - index)
        near = ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1
        far = ((CUBIC * x - 5 * CUBIC) * x + 8 * CUBIC) * x - 4 * CUBIC
        np.add.at(
            shares, (np.arange(side), np.clip(index, 0, n - 1).astype(int)), np.where(x <= 1, near, far)
        )
    return shares


def stored(name: str) -> tuple[Sequence[str], float]:
    """The names in the file of a weight of the graph, and the factor by which its inputs are enlarged."""
    return split_names(name), 1.0


def inputs(config: VisionConfig, grids: Sequence[Grid]) -> dict[str, NDArray[Any]]:
    """The graph's inputs beside the pixels: none."""
    return {}


def build(config: VisionConfig, weights: Weights, grids: Sequence[Grid], layers: Layers) -> TowerGraph:
    """The graph for pictures of these grids, packed one after the other.

    Args:
        layers: how its layers are made.
    """
    runs = segments(grids)
    seen = config.grid_side**2  # patches of a picture
    count = sum(grid[0] for grid in grids)
    n, eps = count * seen, config.eps
    g = Graph(max_nodes=64 + config.n_layer * layers.max_nodes(runs) + count * layers.max_nodes([(1, seen)]))
    pixels = g.input(ggml.Type.F32, config.n_patch_in, n)

    def heads(x: Tensor, width: int, head_dim: int, i: int = 0, first: int = 0, size: int = 0) -> Tensor:
        # the i-th part of this width of every row, rows from the first, as [head_dim, n_head, size]
        shape = (head_dim, width // head_dim, size or x.shape[1])
        strides = (4 * head_dim, x.strides[1], x.strides[1] * shape[2])
        return x.view(shape, strides, 4 * i * width + first * x.strides[1])

    def placed(x: Tensor, table: str) -> Tensor:
        # positions are the same for every picture
        per_picture = x.reshape(x.shape[0], seen, count) + g.weight(weights[table])
        return per_picture.reshape(x.shape[0], n)

    def attention(x: Tensor, block: str) -> Tensor:
        width, head_dim = config.n_embd, config.head_dim
        if f"{block}attn_qkv.weight" in weights:
            h = layers.norm(g, x, f"{block}ln1", eps, then=f"{block}attn_qkv")
            qkv = layers.linear(g, h, f"{block}attn_qkv")
            q, k, v = (heads(qkv, width, head_dim, i) for i in range(3))
        else:
            h = layers.norm(g, x, f"{block}ln1", eps, then="")
            q, k, v = (heads(layers.linear(g, h, f"{block}attn_{i}"), width, head_dim) for i in "qkv")
        mixed = layers.attend(g, q, k, v, runs, 1 / math.sqrt(head_dim), then=f"{block}attn_out")
        return layers.linear(g, mixed, f"{block}attn_out", residual=x)

    def mlp(x: Tensor, block: str) -> Tensor:
        h = layers.norm(g, x, f"{block}ln2", eps, then=f"{block}ffn_up")
        h = layers.linear(g, h, f"{block}ffn_up", act="gelu", then=f"{block}ffn_down")
        return layers.linear(g, h, f"{block}ffn_down", residual=x)

    def resampler(x: Tensor) -> Tensor:
        name, width, head_dim = "resampler.attn", config.n_out, config.n_out // config.n_out_head
        kv = layers.norm(g, layers.linear(g, x, "resampler.kv"), "resampler.ln_kv", eps, then="")
        query = layers.norm(g, g.weight(weights[QUERY]), "resampler.ln_q", eps, then="")
        query = query + g.weight(weights[QUERY_TABLE])
        q = heads(layers.linear(g, query, f"{name}.q"), width, head_dim)
        keys = layers.linear(g, placed(kv, KEY_TABLE), f"{name}.k")
        values = layers.linear(g, kv, f"{name}.v")
        mixed = []
        for first in range(0, n, seen):
            k, v = (heads(part, width, head_dim, 0, first, seen) for part in (keys, values))
            mixed.append(layers.attend(g, q, k, v, [(1, seen)], 1 / math.sqrt(head_dim), then=""))
        h = layers.linear(g, joined(mixed), f"{name}.out")
        h = layers.norm(g, h, "resampler.ln_post", eps, then="resampler.proj")
        return layers.linear(g, h, "resampler.proj")

    x = placed(g.weight(weights[PATCH]) @ pixels, TABLE)
    x = layers.norm(g, x, "v.pre_ln", eps, then="")
    for i in range(config.n_layer):
        block = f"v.blk.{i}."
        x = g.name(mlp(attention(x, block), block), f"@{i + 1}")
    return TowerGraph(g, {PIXELS: pixels}, g.output(resampler(x)))
