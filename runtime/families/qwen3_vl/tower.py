"""Qwen3-VL's vision tower as a ggml graph (arXiv 2511.21631, section 2).

    patches ─► patch embedding + learned positions ─► depth × (attention, MLP) ─► merger ─► embeddings
                                                            │
                                                            └─► deepstack mergers ─► features beside them

Learned positions of a 48×48 grid are interpolated to the picture's own; rotary positions come on top. After
some blocks a merger of its own takes features which the decoder adds to its first layers ("DeepStack"): an
embedding row is [merger | deepstack 0 | deepstack 1 | …], as llama.cpp takes it.
Reference: transformers, models/qwen3_vl/modeling_qwen3_vl.py, Qwen3VLVisionModel.
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
)
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
    check_heads,
    check_merge,
    checked,
    float32,
    patch_matrix,
    setting,
    tensor,
    vectors,
)
from qvl.runtime.vision.tower import PIXELS, Operations, TowerGraph
from qvl.runtime.vision.video_options import VideoOptions

_HALF: Final = (0.5, 0.5, 0.5)
PREPROCESSOR: Final = Preprocessor(
    patch_size=16,
    min_pixels=256 * 256,
    max_pixels=4096 * 4096,
    mean=_HALF,
    std=_HALF,
    sampling=VideoOptions(
        min_pixels=32 * 32, max_pixels=1 << 30, total_pixels=12288 * 32 * 32, by_volume=True
    ),
)
TABLE: Final = "v.position_embd.weight"
CORNERS: Final = 4


@dataclass(frozen=True)
class VisionConfig:
    """The tower's dimensions.

    Attributes:
        n_embd: width of the tower.
        n_ff: width of the MLPs' inner layer.
        n_text: width of the decoder.
        merge_size: patches merged along each side.
        table_side: learned positions along each side.
        deepstack: blocks, counted from 0, after which features are taken.
        eps: of the layer norms.
    """

    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_text: int
    patch_size: int
    merge_size: int
    table_side: int
    deepstack: tuple[int, ...]
    eps: float

    @property
    def n_out(self) -> int:
        """Width of an embedding row."""
        return self.n_text * (1 + len(self.deepstack))

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
        mergers = (1 + len(self.deepstack)) * group * (group + self.n_text) / self.merge_size**2
        return Operations(2.0 * patches * (products + mergers), 4.0 * self.n_layer * width * patches**2)

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape, rows first, of every tensor that the graph reads."""
        d, inner, p = self.n_embd, self.n_ff, self.patch_size
        group = d * self.merge_size**2
        for name in PATCH_KERNELS:
            yield name, (d, CHANNELS, p, p)
        yield "v.patch_embd.bias", (d,)
        yield TABLE, (self.table_side**2, d)
        matrices = [("mm.0", group, group), ("mm.2", self.n_text, group)]
        norms = [("v.post_ln", d)]
        for i in range(self.n_layer):
            b = f"v.blk.{i}."
            matrices += [(f"{b}attn_qkv", 3 * d, d), (f"{b}attn_out", d, d)]
            matrices += [(f"{b}ffn_up", inner, d), (f"{b}ffn_down", d, inner)]
            norms += [(f"{b}ln1", d), (f"{b}ln2", d)]
        for i in self.deepstack:
            matrices += [(f"v.deepstack.{i}.fc1", group, group), (f"v.deepstack.{i}.fc2", self.n_text, group)]
            norms.append((f"v.deepstack.{i}.norm", group))
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
    check_heads(file, n_embd, n_head)
    n_layer = setting(file, "block_count")
    marked = setting(file, "is_deepstack_layers", [])
    if len(marked) not in (0, n_layer):
        raise GGUFError(
            f"{file.path}: clip.vision.is_deepstack_layers has {len(marked)} values, expected {n_layer}"
        )
    n_positions = tensor(file, TABLE).shape[0]
    side = math.isqrt(n_positions)
    if side**2 != n_positions or side < 1:
        raise GGUFError(f"{file.path}: {TABLE} has {n_positions} rows, expected a square number")
    return VisionConfig(
        n_layer=n_layer,
        n_embd=n_embd,
        n_ff=tensor(file, "v.blk.0.ffn_up.weight").shape[0],
        n_head=n_head,
        n_text=tensor(file, "mm.2.weight").shape[0],
        patch_size=setting(file, "patch_size"),
        merge_size=check_merge(file, setting(file, "spatial_merge_size", 2)),
        table_side=side,
        deepstack=tuple(i for i, taken in enumerate(marked) if taken),
        eps=float(setting(file, "attention.layer_norm_epsilon", 1e-6)),
    )


def load(file: GGUFFile, config: VisionConfig, device: Device) -> Weights:
    """The tower's weights on a device: matrices as stored, the rest in float32.

    Raises:
        GGUFError: tensors are missing or have another shape or type; the message names them.
        BackendError: the device has too little memory.
    """
    found = checked(file, dict(file.tensors), dict(config.shapes()), (*PATCH_KERNELS, TABLE))
    patch = patch_matrix(file, *(found.pop(name) for name in PATCH_KERNELS))
    table = float32(file, found.pop(TABLE))
    computed = {PATCH_KERNELS[0]: Array(patch), TABLE: Array(table), **vectors(file, found)}
    return Weights(file, found, computed, device)


def stored(name: str) -> tuple[Sequence[str], float]:
    """The names in the file of a weight of the graph, and the factor by which its inputs are enlarged."""
    return [name], 1.0


def interpolation(
    grids: Sequence[Grid], side: int, merge_size: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The four learned positions around each patch, and the weight of each, in merge order.

    The picture's grid spans the learned one corner to corner (`align_corners`); every frame has the same.

    Returns:
        int32 and float32 [4, n].

    Source: transformers, vision_utils.get_vision_interpolation_indices_and_weights.
    """
    indices: list[NDArray[np.int32]] = []
    shares: list[NDArray[np.float32]] = []
    for t, h, w in grids:
        axes = []
        for size in (h, w):
            place = np.arange(size, dtype=np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
            low = np.floor(place)
            nearest = np.stack([low, np.minimum(low + 1, side - 1)]).astype(np.int32)
            axes.append((nearest, np.stack([1 - (place - low), place - low])))
        (rows, down), (columns, right) = axes
        index = rows[:, None, :, None] * side + columns[None, :, None, :]
        share = down[:, None, :, None] * right[None, :, None, :]
        blocks = (CORNERS, h // merge_size, merge_size, w // merge_size, merge_size)
        for values, found in ((index, indices), (share, shares)):
            merge_order = values.reshape(blocks).transpose(0, 1, 3, 2, 4).reshape(CORNERS, -1)
            found.append(np.tile(merge_order, (1, t)))
    return np.concatenate(indices, axis=1), np.concatenate(shares, axis=1)


def inputs(config: VisionConfig, grids: Sequence[Grid]) -> dict[str, NDArray[Any]]:
    """The graph's inputs beside the pixels."""
    indices, shares = interpolation(grids, config.table_side, config.merge_size)
    where = rotary_positions(grids, config.merge_size)
    return {"positions": where, "corners": indices, "shares": shares}


def build(config: VisionConfig, weights: Weights, grids: Sequence[Grid], layers: Layers) -> TowerGraph:
    """The graph for pictures of these grids, packed one after the other.

    Args:
        layers: how its layers are made.
    """
    runs = segments(grids)
    g = Graph(max_nodes=128 + (config.n_layer + len(config.deepstack)) * layers.max_nodes(runs))
    n = sum(count * size for count, size in runs)
    pixels = g.input(ggml.Type.F32, config.n_patch_in, n)
    where = g.input(ggml.Type.I32, 4 * n)
    corners = g.input(ggml.Type.I32, n, CORNERS)
    shares = g.input(ggml.Type.F32, 1, n, CORNERS)
    eps, scale = config.eps, 1 / math.sqrt(config.head_dim)
    group = config.merge_size**2
    merged_size = (config.n_embd * group, n // group)

    def learned(corner: int) -> Tensor:
        index = corners.view((n,), (corners.strides[1],), corner * corners.strides[1])
        share = shares.view((1, n), (shares.strides[1],), corner * shares.strides[2])
        return g.weight(weights[TABLE]).rows(index) * share

    def attention(x: Tensor, block: str) -> Tensor:
        h = layers.norm(g, x, f"{block}ln1", eps, then=f"{block}attn_qkv")
        q, k, v = rotary_heads(g, layers, weights, config.head_dim, h, block, where)
        seen = layers.attend(g, q, k, v, runs, scale, then=f"{block}attn_out")
        return layers.linear(g, seen, f"{block}attn_out", residual=x)

    def mlp(x: Tensor, block: str) -> Tensor:
        h = layers.norm(g, x, f"{block}ln2", eps, then=f"{block}ffn_up")
        h = layers.linear(g, h, f"{block}ffn_up", act="gelu_tanh", then=f"{block}ffn_down")
        return layers.linear(g, h, f"{block}ffn_down", residual=x)

    def merger(x: Tensor, first: str, second: str) -> Tensor:
        return layers.linear(g, layers.linear(g, x, first, act="gelu", then=second), second)

    def deepstack(x: Tensor, i: int) -> Tensor:
        name = f"v.deepstack.{i}"
        h = layers.norm(g, x.reshape(*merged_size), f"{name}.norm", eps, then=f"{name}.fc1")
        return merger(h, f"{name}.fc1", f"{name}.fc2")

    x = g.weight(weights[PATCH_KERNELS[0]]) @ pixels + g.weight(weights["v.patch_embd.bias"])
    for corner in range(CORNERS):
        x = x + learned(corner)
    features = []
    for i in range(config.n_layer):
        block = f"v.blk.{i}."
        x = g.name(mlp(attention(x, block), block), f"@{i + 1}")
        if i in config.deepstack:
            features.append(deepstack(x, i))
    x = layers.norm(g, x, "v.post_ln", eps, then="mm.0").reshape(*merged_size)
    x = merger(x, "mm.0", "mm.2")
    for feature in features:
        x = x.concat(feature, axis=0)
    return TowerGraph(
        g, {PIXELS: pixels, "positions": where, "corners": corners, "shares": shares}, g.output(x)
    )
