"""Qwen2.5-VL's vision tower as a ggml graph (arXiv 2502.13923, section 2.1).

    patches ─► patch embedding ─► depth × (attention, SwiGLU MLP) ─► RMS norm ─► 2×2 merger ─► embeddings

Most blocks attend within windows of 112×112 pixels, every eighth within the whole frame. Patches of a
window lie together while such blocks run; blocks with full attention, and the merger, see them in merge
order. Windows at the right and lower edges are smaller. They are sorted by size, over all pictures, so that
equal ones form one run; which window comes first changes nothing.
Reference: transformers, models/qwen2_5_vl/modeling_qwen2_5_vl.py, Qwen2_5_VisionTransformerPretrainedModel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qvl.runtime.errors import GGUFError
from qvl.runtime.families.qwen2_vl.tower import (
    CHANNELS,
    FRAMES_PER_PATCH,
    PATCH_KERNELS,
    split_names,
)
from qvl.runtime.ggml import library as ggml
from qvl.runtime.ggml.devices import Device
from qvl.runtime.ggml.gguf import GGUFFile
from qvl.runtime.ggml.graph import Graph, Tensor
from qvl.runtime.ggml.weights import Array, Weights
from qvl.runtime.vision.grid import TOKEN_PIXELS, Grid, Runs, merged, n_patches, segments
from qvl.runtime.vision.layers import Layers
from qvl.runtime.vision.preprocess import Preprocessor
from qvl.runtime.vision.rope_2d import rotary_heads, rotary_positions
from qvl.runtime.vision.tensors import (
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
from qvl.runtime.vision.video_options import VideoOptions

PREPROCESSOR: Final = Preprocessor(sampling=VideoOptions(total_pixels=int(128000 * TOKEN_PIXELS * 0.9)))
WINDOW_SIZE: Final = 112


@dataclass(frozen=True)
class VisionConfig:
    """The tower's dimensions.

    Attributes:
        n_embd: width of the tower.
        n_ff: width of the MLPs' inner layer.
        n_out: width of the embeddings, the decoder's n_embd.
        merge_size: patches merged along each side.
        window: side of a window, in merged tokens.
        full_every: one block in so many, the last of them, attends within the whole frame.
        eps: of the RMS norms.
    """

    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_out: int
    patch_size: int
    merge_size: int
    window: int
    full_every: int
    eps: float

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def n_patch_in(self) -> int:
        """Values of a patch: 3 channels × 2 frames × patch_size²."""
        return CHANNELS * FRAMES_PER_PATCH * self.patch_size**2

    def is_full(self, layer: int) -> bool:
        """True if a block attends within the whole frame."""
        return (layer + 1) % self.full_every == 0

    def operations(self, patches: int) -> Operations:
        """The work of encoding one picture of so many patches."""
        width = self.n_embd
        products = self.n_layer * (4 * width**2 + 3 * width * self.n_ff)
        group = width * self.merge_size**2
        merger = group * (group + self.n_out) / self.merge_size**2
        full = self.n_layer // self.full_every
        window = min(patches, (self.window * self.merge_size) ** 2)
        seen = full * patches + (self.n_layer - full) * window
        return Operations(2.0 * patches * (products + merger), 4.0 * width * patches * seen)

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape, rows first, of every tensor that the graph reads."""
        d, inner, p = self.n_embd, self.n_ff, self.patch_size
        for name in PATCH_KERNELS:
            yield name, (d, CHANNELS, p, p)
        for i in range(self.n_layer):
            b = f"v.blk.{i}."
            for name, rows, columns in (
                ("attn_q", d, d), ("attn_k", d, d), ("attn_v", d, d), ("attn_out", d, d),
                ("ffn_gate", inner, d), ("ffn_up", inner, d), ("ffn_down", d, inner),
            ):  # fmt: skip
                yield f"{b}{name}.weight", (rows, columns)
                yield f"{b}{name}.bias", (rows,)
            yield f"{b}ln1.weight", (d,)
            yield f"{b}ln2.weight", (d,)
        group = d * self.merge_size**2
        yield "v.post_ln.weight", (d,)
        for name, rows in (("mm.0", group), ("mm.2", self.n_out)):
            yield f"{name}.weight", (rows, group)
            yield f"{name}.bias", (rows,)


def read_config(file: GGUFFile) -> VisionConfig:
    """The tower's dimensions from the metadata and the shapes.

    Raises:
        GGUFError: a missing key, or an impossible value.
    """
    n_embd = setting(file, "embedding_length")
    n_head = setting(file, "attention.head_count")
    check_heads(file, n_embd, n_head)
    patch_size = setting(file, "patch_size")
    merge_size = check_merge(file, setting(file, "spatial_merge_size", 2))
    window_size = setting(file, "window_size", WINDOW_SIZE)
    if window_size < patch_size * merge_size:
        least = patch_size * merge_size
        raise GGUFError(f"{file.path}: clip.vision.window_size is {window_size}, expected at least {least}")
    return VisionConfig(
        n_layer=setting(file, "block_count"),
        n_embd=n_embd,
        n_ff=tensor(file, "v.blk.0.ffn_up.weight").shape[0],
        n_head=n_head,
        n_out=tensor(file, "mm.2.weight").shape[0],
        patch_size=patch_size,
        merge_size=merge_size,
        window=window_size // merge_size // patch_size,
        full_every=setting(file, "n_wa_pattern"),
        eps=float(setting(file, "attention.layer_norm_epsilon", 1e-6)),
    )


def load(file: GGUFFile, config: VisionConfig, device: Device) -> Weights:
    """The tower's weights on a device: matrices as stored, vectors and patch embedding in float32.

    Raises:
        GGUFError: tensors are missing or have another shape or type; the message names them.
        BackendError: the device has too little memory.
    """
    tensors = dict(file.tensors)
    for i in range(config.n_layer):
        split_qkv(tensors, f"v.blk.{i}.attn_")
    found = checked(file, tensors, dict(config.shapes()), PATCH_KERNELS)
    patch = patch_matrix(file, *(found.pop(name) for name in PATCH_KERNELS))
    computed = {PATCH_KERNELS[0]: Array(patch), **vectors(file, found)}
    for i in range(config.n_layer):
        join_qkv(found, computed, f"v.blk.{i}.attn_")
    return Weights(file, found, computed, device)


def stored(name: str) -> tuple[Sequence[str], float]:
    """The names in the file of a weight of the graph, and the factor by which its inputs are enlarged."""
    return split_names(name), 1.0


def windows(grids: Sequence[Grid], side: int, merge_size: int) -> tuple[NDArray[np.int32], Runs]:
    """The order in which the tokens of a window lie together, and the windows as runs.

    Args:
        side: of a window, in merged tokens.

    Returns:
        int32 [n_tokens], the place in merge order of each token in window order; and runs of (number of
        windows, patches in each).

    Source: transformers, vision_utils.get_vision_window_index, up to the order of whole windows.
    """
    sizes, ids, first = [], [], 0
    for grid in grids:
        t, h, w = merged(grid, merge_size)
        heights, widths = (np.minimum(side, n - np.arange(0, n, side)) for n in (h, w))
        ranks = np.arange(t * len(heights) * len(widths)).reshape(t, len(heights), len(widths)) + first
        first += ranks.size
        rows, columns = np.arange(h) // side, np.arange(w) // side
        ids.append(ranks[:, rows][:, :, columns].reshape(-1))
        area = np.outer(heights, widths)[rows][:, columns]
        sizes.append(np.broadcast_to(area, (t, h, w)).reshape(-1))
    size, window = np.concatenate(sizes), np.concatenate(ids)
    order = np.lexsort((window, -size)).astype(np.int32)
    unique, counts = np.unique(size, return_counts=True)
    runs = [(int(c // s), int(s) * merge_size**2) for s, c in zip(unique[::-1], counts[::-1], strict=True)]
    return order, runs


def inputs(config: VisionConfig, grids: Sequence[Grid]) -> dict[str, NDArray[Any]]:
    """The graph's inputs beside the pixels: positions and permutations in both orders."""
    order, _ = windows(grids, config.window, config.merge_size)
    where = rotary_positions(grids, config.merge_size)
    in_windows = where.reshape(4, -1, config.merge_size**2)[:, order].reshape(-1)
    back = np.argsort(order).astype(np.int32)
    return {"positions": where, "window positions": in_windows, "to windows": order, "to frames": back}


def build(config: VisionConfig, weights: Weights, grids: Sequence[Grid], layers: Layers) -> TowerGraph:
    """The graph for pictures of these grids, packed one after the other.

    Args:
        layers: how its layers are made.
    """
    frames = segments(grids)
    _, parts = windows(grids, config.window, config.merge_size)
    n_nodes = max(layers.max_nodes(frames), layers.max_nodes(parts))
    g = Graph(max_nodes=64 + config.n_layer * n_nodes)
    n, group = sum(n_patches(grid) for grid in grids), config.merge_size**2
    ends: dict[str, Tensor] = {PIXELS: g.input(ggml.Type.F32, config.n_patch_in, n)}
    scale = 1 / math.sqrt(config.head_dim)

    def index(name: str, size: int) -> Tensor:
        if name not in ends:
            ends[name] = g.input(ggml.Type.I32, size)
        return ends[name]

    def ordered(x: Tensor, name: str) -> Tensor:
        # a merged token's patches move together
        together = x.reshape(config.n_embd * group, n // group)
        return together.rows(index(name, n // group)).reshape(config.n_embd, n)

    def attention(x: Tensor, block: str, full: bool) -> Tensor:
        first = "attn_qkv" if f"{block}attn_qkv.weight" in weights else ""
        h = layers.rms_norm(g, x, f"{block}ln1", config.eps, then=first and f"{block}{first}")
        where = index("positions" if full else "window positions", 4 * n)
        q, k, v = rotary_heads(g, layers, weights, config.head_dim, h, block, where)
        seen = layers.attend(g, q, k, v, frames if full else parts, scale, then=f"{block}attn_out")
        return layers.linear(g, seen, f"{block}attn_out", residual=x)

    def mlp(x: Tensor, block: str) -> Tensor:
        gate, up = f"{block}ffn_gate", f"{block}ffn_up"
        h = layers.rms_norm(g, x, f"{block}ln2", config.eps, then=layers.common(up, gate))
        h = layers.gated(g, h, gate, up, then=f"{block}ffn_down")
        return layers.linear(g, h, f"{block}ffn_down", residual=x)

    x = g.weight(weights[PATCH_KERNELS[0]]) @ ends[PIXELS]
    in_frames = True
    for i in range(config.n_layer):
        block, full = f"v.blk.{i}.", config.is_full(i)
        if full != in_frames:
            x, in_frames = ordered(x, "to frames" if full else "to windows"), full
        x = g.name(mlp(attention(x, block, full), block), f"@{i + 1}")
    x = x if in_frames else ordered(x, "to frames")
    x = layers.rms_norm(g, x, "v.post_ln", config.eps, then="mm.0").reshape(config.n_embd * group, n // group)
    x = layers.linear(g, layers.linear(g, x, "mm.0", act="gelu", then="mm.2"), "mm.2")
    return TowerGraph(g, ends, g.output(x))
