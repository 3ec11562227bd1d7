"""Vision towers by transformers and torch in float32; importing this needs the `parity` extra."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from support.towers import State, TowerShape, tower_state
from torch import nn

Grid = tuple[int, int, int]
Reference = Callable[[NDArray[np.float32], Sequence[Grid]], NDArray[np.float32]]


@lru_cache(maxsize=4)
def reference(shape: TowerShape) -> Reference:
    """A function from pixel_values and grids to embedding rows, float32 [n_tokens, n_out]."""
    if shape.family == "qwen_vl":
        return QwenVLTower(shape, tower_state(shape))
    tower = _transformers(shape).float().eval()
    state = {name: torch.from_numpy(values) for name, values in tower_state(shape).items()}
    tower.load_state_dict(state, strict=True)

    def run(pixels: NDArray[np.float32], grids: Sequence[Grid]) -> NDArray[np.float32]:
        with torch.no_grad():
            out = tower(torch.from_numpy(pixels), grid_thw=torch.tensor(list(grids)))
        features = [out.pooler_output, *(getattr(out, "deepstack_features", None) or [])]
        return np.asarray(torch.cat(features, dim=1))

    return run


def _transformers(s: TowerShape) -> Any:
    common = {"depth": s.depth, "num_heads": s.heads, "patch_size": s.patch, "in_channels": 3}
    if s.family == "qwen2_5_vl":
        from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
            Qwen2_5_VisionTransformerPretrainedModel,
        )

        full = [i for i in range(s.depth) if (i + 1) % s.full_every == 0]
        return Qwen2_5_VisionTransformerPretrainedModel(
            Qwen2_5_VLVisionConfig(
                hidden_size=s.dim, out_hidden_size=s.out, intermediate_size=s.ff, window_size=s.window,
                fullatt_block_indexes=full, **common,
            )
        )  # fmt: skip
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    return Qwen3VLVisionModel(
        Qwen3VLVisionConfig(
            hidden_size=s.dim, out_hidden_size=s.out, intermediate_size=s.ff,
            num_position_embeddings=s.table**2, deepstack_visual_indexes=list(s.deepstack), **common,
        )
    )  # fmt: skip


class QwenVLTower:
    """Qwen-VL's ViT and resampler from torch's stock modules (arXiv 2308.12966, section 2.1)."""

    def __init__(self, shape: TowerShape, state: State) -> None:
        self.shape = shape
        self.state = {name: torch.from_numpy(values) for name, values in state.items()}
        self.blocks = [self._block(i) for i in range(shape.depth)]
        self.pool = nn.MultiheadAttention(shape.out, shape.out_heads, batch_first=True).eval()
        self.pool.load_state_dict(self._below("attn_pool.attn."))

    def _below(self, prefix: str) -> dict[str, torch.Tensor]:
        return {k.removeprefix(prefix): v for k, v in self.state.items() if k.startswith(prefix)}

    def _block(self, i: int) -> nn.TransformerEncoderLayer:
        s = self.shape
        own = self._below(f"transformer.resblocks.{i}.")
        block = nn.TransformerEncoderLayer(
            s.dim, s.heads, s.ff, 0.0, F.gelu, layer_norm_eps=1e-6, batch_first=True, norm_first=True
        )
        state = {}
        for part in ("weight", "bias"):
            # the checkpoint's in_proj holds q, k, v of each head in turn
            joint = own[f"attn.in_proj.{part}"]
            by_head = joint.reshape(s.heads, 3, s.dim // s.heads, *joint.shape[1:])
            state[f"self_attn.in_proj_{part}"] = by_head.transpose(0, 1).reshape(joint.shape)
            state[f"self_attn.out_proj.{part}"] = own[f"attn.out_proj.{part}"]
            state[f"linear1.{part}"] = own[f"mlp.c_fc.{part}"]
            state[f"linear2.{part}"] = own[f"mlp.c_proj.{part}"]
            state[f"norm1.{part}"] = own[f"ln_1.{part}"]
            state[f"norm2.{part}"] = own[f"ln_2.{part}"]
        block.load_state_dict(state, strict=True)
        return block.eval()

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"], 1e-6)

    def _resized(self, table: torch.Tensor, side: int) -> torch.Tensor:
        n = int(len(table) ** 0.5)
        grid = table.reshape(1, n, n, -1).permute(0, 3, 1, 2)
        return F.interpolate(grid, (side, side), mode="bicubic", align_corners=False).flatten(2).mT[0]

    def __call__(self, pixels: NDArray[np.float32], grids: Sequence[Grid]) -> NDArray[np.float32]:
        """pixels: [n · patches, 3 · patch²] in merge order, as qvl cuts them."""
        s = self.shape
        side = s.size // s.patch
        cut = torch.from_numpy(pixels).reshape(-1, side // 2, side // 2, 2, 2, 3, s.patch, s.patch)
        pictures = cut.permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(-1, 3, s.size, s.size)
        with torch.no_grad():
            x = F.conv2d(pictures, self.state["conv1.weight"], stride=s.patch).flatten(2).mT
            x = self._norm(x + self._resized(self.state["positional_embedding"], side), "ln_pre")
            for block in self.blocks:
                x = block(x)
            kv = self._norm(x @ self.state["attn_pool.kv_proj.weight"].T, "attn_pool.ln_kv")
            table = self.state["attn_pool.pos_embed"]
            query = self._norm(self.state["attn_pool.query"], "attn_pool.ln_q") + table
            query = query.expand(len(kv), -1, -1)
            out = self.pool(query, kv + self._resized(table, side), kv, need_weights=False)[0]
            result = self._norm(out, "ln_post") @ self.state["proj"]
        return np.asarray(result.reshape(-1, s.out))
