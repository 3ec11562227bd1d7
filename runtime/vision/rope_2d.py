"""2D-RoPE of the vision towers (Qwen2-VL, arXiv 2409.12191, section 2.1).

Half of a head's rotary pairs turn by a patch's row, half by its column, in place of learned positions; so
a tower takes grids of any size. The rotation itself is ggml's (`Tensor.rope_vision`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qvl.runtime.ggml.graph import Graph, Tensor
from qvl.runtime.ggml.weights import Weights
from qvl.runtime.vision.grid import Grid
from qvl.runtime.vision.layers import Layers


def rotary_positions(grids: Sequence[Grid], merge: int = 2) -> NDArray[np.int32]:
    """Row and column of every patch, in merge order, in the layout of ggml's vision rotary.

    Returns:
        int32 [4 n]: n rows, n columns, 2 n zeros.

    Source: transformers, Qwen2VisionTransformerPretrainedModel.rot_pos_emb.
    """
    parts = []
    for t, h, w in grids:
        rows, columns = np.meshgrid(np.arange(h, dtype=np.int32), np.arange(w, dtype=np.int32), indexing="ij")
        both = np.stack([rows, columns]).reshape(2, h // merge, merge, w // merge, merge)
        parts.append(np.tile(both.transpose(0, 1, 3, 2, 4).reshape(2, -1), (1, t)))
    hw = np.concatenate(parts, axis=1)
    return np.concatenate([hw.reshape(-1), np.zeros(hw.size, np.int32)])


def rotary_heads(
    g: Graph, layers: Layers, weights: Weights, head_dim: int, x: Tensor, block: str, where: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a block, [head_dim, n_head, n], the first two with 2D rotary positions."""
    n = x.shape[1]

    def heads(y: Tensor, i: int, parts: int) -> Tensor:
        # the i-th of the parts that lie beside each other in a row
        width = y.shape[0] // parts
        strides = (4 * head_dim, y.strides[1], y.strides[1] * n)
        return y.view((head_dim, width // head_dim, n), strides, i * 4 * width)

    if f"{block}attn_qkv.weight" in weights:
        qkv = layers.linear(g, x, f"{block}attn_qkv")
        q, k, v = (heads(qkv, i, 3) for i in range(3))
    else:
        q, k, v = (heads(layers.linear(g, x, f"{block}attn_{name}"), 0, 1) for name in "qkv")
    sections = [head_dim // 4] * 4
    return q.rope_vision(where, sections), k.rope_vision(where, sections), v
