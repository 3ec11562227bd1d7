"""Random vision towers of every family, by the names of their checkpoints and as vision GGUF files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter
from numpy.typing import NDArray

State = dict[str, NDArray[np.float32]]
CLIP = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])


@dataclass(frozen=True)
class TowerShape:
    """Sizes of a vision tower.

    Attributes:
        full_every: Qwen2.5-VL: one block in so many, the last of them, attends within the whole frame.
        window: Qwen2.5-VL: side of a window, in pixels.
        deepstack: Qwen3-VL: blocks after which features are taken.
        table: Qwen3-VL and Qwen-VL: learned positions along each side.
        size: Qwen-VL: side of the picture.
    """

    family: str
    dim: int = 64
    heads: int = 2
    depth: int = 4
    ff: int = 96
    out: int = 64
    out_heads: int = 2
    full_every: int = 2
    window: int = 112
    deepstack: tuple[int, ...] = (0, 2)
    table: int = 48
    size: int = 448
    seed: int = 0

    @property
    def patch(self) -> int:
        return 16 if self.family == "qwen3_vl" else 14

    @property
    def group(self) -> int:
        """Width of a merged token before the merger."""
        return 4 * self.dim

    @property
    def queries(self) -> int:
        """Qwen-VL: queries along each side."""
        return self.size // self.patch // 2


def tower_state(shape: TowerShape) -> State:
    """Random weights by the names of the checkpoint, below the vision tower's prefix."""
    rng = np.random.default_rng(shape.seed)
    state = {}
    for name, size in {
        "qwen2_vl": _qwen2_vl,
        "qwen2_5_vl": _qwen2_5_vl,
        "qwen3_vl": _qwen3_vl,
        "qwen_vl": _qwen_vl,
    }[shape.family](shape):
        values = rng.standard_normal(size, dtype=np.float32) * np.float32(0.06)
        state[name] = values + np.float32(1) if _is_norm(name) else values
        if name.endswith(("pos_embed", "pos_embed.weight", "positional_embedding", "query")):
            state[name] = values * np.float32(8)
    return state


def _is_norm(name: str) -> bool:
    return name.endswith(".weight") and ("norm" in name or "ln_" in name)


def _linear(name: str, rows: int, columns: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (rows, columns)
    yield f"{name}.bias", (rows,)


def _norm(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _qwen2_vl(s: TowerShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "patch_embed.proj.weight", (s.dim, 3, 2, s.patch, s.patch)
    for i in range(s.depth):
        b = f"blocks.{i}."
        yield from _norm(f"{b}norm1", s.dim)
        yield from _norm(f"{b}norm2", s.dim)
        yield from _linear(f"{b}attn.qkv", 3 * s.dim, s.dim)
        yield from _linear(f"{b}attn.proj", s.dim, s.dim)
        yield from _linear(f"{b}mlp.fc1", s.ff, s.dim)
        yield from _linear(f"{b}mlp.fc2", s.dim, s.ff)
    yield from _norm("merger.ln_q", s.dim)
    yield from _linear("merger.mlp.0", s.group, s.group)
    yield from _linear("merger.mlp.2", s.out, s.group)


def _qwen2_5_vl(s: TowerShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "patch_embed.proj.weight", (s.dim, 3, 2, s.patch, s.patch)
    for i in range(s.depth):
        b = f"blocks.{i}."
        yield f"{b}norm1.weight", (s.dim,)
        yield f"{b}norm2.weight", (s.dim,)
        yield from _linear(f"{b}attn.qkv", 3 * s.dim, s.dim)
        yield from _linear(f"{b}attn.proj", s.dim, s.dim)
        yield from _linear(f"{b}mlp.gate_proj", s.ff, s.dim)
        yield from _linear(f"{b}mlp.up_proj", s.ff, s.dim)
        yield from _linear(f"{b}mlp.down_proj", s.dim, s.ff)
    yield "merger.ln_q.weight", (s.dim,)
    yield from _linear("merger.mlp.0", s.group, s.group)
    yield from _linear("merger.mlp.2", s.out, s.group)


def _qwen3_vl(s: TowerShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "patch_embed.proj.weight", (s.dim, 3, 2, s.patch, s.patch)
    yield "patch_embed.proj.bias", (s.dim,)
    yield "pos_embed.weight", (s.table**2, s.dim)
    for i in range(s.depth):
        b = f"blocks.{i}."
        yield from _norm(f"{b}norm1", s.dim)
        yield from _norm(f"{b}norm2", s.dim)
        yield from _linear(f"{b}attn.qkv", 3 * s.dim, s.dim)
        yield from _linear(f"{b}attn.proj", s.dim, s.dim)
        yield from _linear(f"{b}mlp.linear_fc1", s.ff, s.dim)
        yield from _linear(f"{b}mlp.linear_fc2", s.dim, s.ff)
    for name, width in (
        ("merger", s.dim),
        *((f"deepstack_merger_list.{i}", s.group) for i in range(len(s.deepstack))),
    ):
        yield from _norm(f"{name}.norm", width)
        yield from _linear(f"{name}.linear_fc1", s.group, s.group)
        yield from _linear(f"{name}.linear_fc2", s.out, s.group)


def _qwen_vl(s: TowerShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "conv1.weight", (s.dim, 3, s.patch, s.patch)
    yield "positional_embedding", (s.table**2, s.dim)
    yield from _norm("ln_pre", s.dim)
    for i in range(s.depth):
        b = f"transformer.resblocks.{i}."
        yield from _norm(f"{b}ln_1", s.dim)
        yield from _norm(f"{b}ln_2", s.dim)
        yield from _linear(f"{b}attn.in_proj", 3 * s.dim, s.dim)
        yield from _linear(f"{b}attn.out_proj", s.dim, s.dim)
        yield from _linear(f"{b}mlp.c_fc", s.ff, s.dim)
        yield from _linear(f"{b}mlp.c_proj", s.dim, s.ff)
    yield "attn_pool.kv_proj.weight", (s.out, s.dim)
    yield "attn_pool.query", (s.queries**2, s.out)
    yield "attn_pool.pos_embed", (s.queries**2, s.out)
    yield from _norm("attn_pool.ln_q", s.out)
    yield from _norm("attn_pool.ln_kv", s.out)
    yield "attn_pool.attn.in_proj_weight", (3 * s.out, s.out)
    yield "attn_pool.attn.in_proj_bias", (3 * s.out,)
    yield from _linear("attn_pool.attn.out_proj", s.out, s.out)
    yield from _norm("ln_post", s.out)
    yield "proj", (s.out, s.out)


def write_tower(path: Path, shape: TowerShape, dtype: type = np.float32, **metadata: Any) -> Path:
    """A vision GGUF file with a shape's random weights, by the names and keys of llama.cpp's converter.

    Args:
        dtype: of matrices in the blocks and mergers.
        metadata: further keys below `clip.vision.`, in place of those that belong there.
    """
    writer = GGUFWriter(path, "clip")
    mean, std = CLIP if shape.family != "qwen3_vl" else ([0.5] * 3, [0.5] * 3)
    projector = {
        "qwen_vl": "qwenvl_resampler",
        "qwen2_vl": "qwen2vl_merger",
        "qwen2_5_vl": "qwen2.5vl_merger",
        "qwen3_vl": "qwen3vl_merger",
    }[shape.family]
    writer.add_string("clip.projector_type", projector)
    writer.add_bool("clip.has_vision_encoder", True)
    own: dict[str, Any] = {
        "image_size": shape.size, "patch_size": shape.patch, "embedding_length": shape.dim,
        "feed_forward_length": shape.ff, "projection_dim": shape.out, "block_count": shape.depth,
        "attention.head_count": shape.heads, "attention.layer_norm_epsilon": 1e-6,
        "image_mean": mean, "image_std": std,
    }  # fmt: skip
    if shape.family == "qwen2_vl":
        writer.add_bool("clip.use_gelu", False)
    if shape.family == "qwen2_5_vl":
        writer.add_bool("clip.use_silu", True)
        own |= {"n_wa_pattern": shape.full_every, "window_size": shape.window}
    if shape.family == "qwen3_vl":
        writer.add_bool("clip.use_gelu", True)
        marked = [i in shape.deepstack for i in range(shape.depth)]
        own |= {"is_deepstack_layers": marked, "spatial_merge_size": 2, "image_size": shape.table * 16}
    if shape.family == "qwen_vl":
        own |= {"projector.query_side": shape.queries, "projector.head_count": shape.out_heads}
    for name, value in (own | metadata).items():
        key = f"clip.vision.{name}"
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    for name, array in mmproj_tensors(shape, tower_state(shape)):
        matrix = array.ndim == 2 and name.endswith("weight") and "embd" not in name
        writer.add_tensor(name, np.ascontiguousarray(array.astype(dtype if matrix else np.float32)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


_SHORT = {
    "patch_embed.proj": "v.patch_embd", "conv1": "v.patch_embd", "pos_embed.weight": "v.position_embd.weight",
    "positional_embedding": "v.position_embd.weight", "ln_pre": "v.pre_ln",
    "transformer.resblocks.": "v.blk.", "blocks.": "v.blk.",
    ".norm1": ".ln1", ".norm2": ".ln2", ".ln_1": ".ln1", ".ln_2": ".ln2",
    ".attn.proj": ".attn_out", "attn.qkv": "attn_qkv", ".mlp.fc1": ".ffn_up", ".mlp.fc2": ".ffn_down",
    ".mlp.linear_fc1": ".ffn_up", ".mlp.linear_fc2": ".ffn_down", ".mlp.c_fc": ".ffn_up",
    ".mlp.c_proj": ".ffn_down", ".mlp.gate_proj": ".ffn_gate", ".mlp.up_proj": ".ffn_up",
    ".mlp.down_proj": ".ffn_down", "merger.ln_q": "v.post_ln", "merger.norm": "v.post_ln",
    "merger.mlp.": "mm.", "merger.linear_fc1": "mm.0", "merger.linear_fc2": "mm.2",
}  # fmt: skip


def mmproj_tensors(shape: TowerShape, state: State) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """A state by the names of a vision GGUF file, cut and turned as they are there."""
    for name, array in state.items():
        if name == "patch_embed.proj.weight":
            yield "v.patch_embd.weight", array[:, :, 0]
            yield "v.patch_embd.weight.1", array[:, :, 1]
        elif name.startswith("deepstack_merger_list."):
            _, i, part, suffix = name.split(".")
            part = {"norm": "norm", "linear_fc1": "fc1", "linear_fc2": "fc2"}[part]
            yield f"v.deepstack.{shape.deepstack[int(i)]}.{part}.{suffix}", array
        elif ".attn.in_proj." in name:  # interleaved by head
            block, suffix = name.removeprefix("transformer.resblocks.").split(".attn.in_proj.")
            parts = array.reshape(shape.heads, 3, shape.dim // shape.heads, *array.shape[1:])
            for i, x in enumerate("qkv"):
                yield f"v.blk.{block}.attn_{x}.{suffix}", parts[:, i].reshape(shape.dim, *array.shape[1:])
        elif "attn_pool.attn.in_proj_" in name:
            for x, third in zip("qkv", np.split(array, 3), strict=True):
                yield f"resampler.attn.{x}.{name.rsplit('_', 1)[1]}", third
        elif name.startswith("attn_pool.") or name.startswith("ln_post"):
            short = name.removeprefix("attn_pool.").replace("out_proj", "out").replace("kv_proj", "kv")
            yield f"resampler.{short.replace('pos_embed', 'pos_embed_k')}", array
        elif name == "proj":
            yield "resampler.proj.weight", array.T
        elif ".attn.qkv." in name and shape.family != "qwen3_vl":
            block, suffix = name.removeprefix("blocks.").split(".attn.qkv.")
            for x, third in zip("qkv", np.split(array, 3), strict=True):
                yield f"v.blk.{block}.attn_{x}.{suffix}", third
        else:
            for long, short in _SHORT.items():
                name = name.replace(long, short)
            yield name.replace(".attn.out_proj", ".attn_out"), array
