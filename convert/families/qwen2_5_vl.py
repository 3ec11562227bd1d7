"""Qwen2.5-VL's checkpoints (arXiv 2502.13923): Qwen2-VL's decoder; an encoder with windows, RMSNorm and
SwiGLU.

Names are those of llama.cpp's converter (conversion/qwenvl.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from qvl.convert.families import qwen2_vl
from qvl.convert.families.qwen2_vl import IMAGE_SIZE, MERGER, TEXT_DEFAULTS
from qvl.convert.family import Metadata
from qvl.convert.hyperparameters import ModelConfig, Section, VisionHyperparameters, read_text
from qvl.convert.layers import (
    Rule,
    check_heads,
    check_layout,
    encoder_metadata,
    pairs,
    patch_kernels,
    split_qkv,
    vision_sizes,
)
from qvl.convert.rows import Mapped
from qvl.runtime.families import table

CONTROL_TOKENS: Final = qwen2_vl.CONTROL_TOKENS
MIN_PIXELS: Final = qwen2_vl.MIN_PIXELS
MAX_PIXELS: Final = qwen2_vl.MAX_PIXELS
IMAGE_MEAN: Final = qwen2_vl.IMAGE_MEAN
IMAGE_STD: Final = qwen2_vl.IMAGE_STD
text_rows = qwen2_vl.text_rows
text_metadata = qwen2_vl.text_metadata

# Qwen2_5_VLVisionConfig of transformers 5
VISION_DEFAULTS: Final = {
    "depth": 32,
    "hidden_size": 3584,
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_channels": 3,
    "in_chans": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "tokens_per_second": 4,
    "window_size": 112,
    "out_hidden_size": 3584,
    "fullatt_block_indexes": (7, 15, 23, 31),
}
MLP: Final[tuple[Rule, ...]] = (
    ("attn.proj", "attn_out", ("dim", "dim")),
    ("mlp.gate_proj", "ffn_gate", ("mlp", "dim")),
    ("mlp.up_proj", "ffn_up", ("mlp", "dim")),
    ("mlp.down_proj", "ffn_down", ("dim", "mlp")),
)
NORMS: Final = (("norm1", "ln1"), ("norm2", "ln2"))


@dataclass(frozen=True)
class WindowedVisionConfig(VisionHyperparameters):
    """The image encoder.

    Attributes:
        full_every: each block whose number is one less than a multiple of it attends to the whole frame.
        window_size: side of a window in pixels.
        tokens_per_second: temporal positions to a second of video.
    """

    full_every: int
    window_size: int
    tokens_per_second: int


def read(root: Section) -> ModelConfig:
    text = read_text(root, root.text(TEXT_DEFAULTS))
    vision = root.section("vision_config", VISION_DEFAULTS)
    vision.expect("hidden_act", "silu")
    channels = "in_chans" if "in_chans" in vision.values else "in_channels"
    dim, heads = check_heads(vision, "hidden_size")
    config = WindowedVisionConfig(
        depth=vision.count("depth"),
        embed_dim=dim,
        num_heads=heads,
        mlp_size=vision.count("intermediate_size"),
        hidden_size=vision.count("out_hidden_size"),
        in_channels=vision.count(channels),
        patch_size=vision.count("patch_size"),
        spatial_merge_size=vision.count("spatial_merge_size"),
        temporal_patch_size=vision.count("temporal_patch_size"),
        full_every=_full_every(vision),
        window_size=vision.count("window_size"),
        tokens_per_second=vision.count("tokens_per_second"),
    )
    check_layout(vision, config, channels)
    side = config.patch_size * config.spatial_merge_size
    if config.window_size % side:
        raise vision.error("window_size", f"a multiple of {side} pixels, the side of a merged patch")
    return ModelConfig(table.named("qwen2_5_vl"), "qwen2vl", text, config)


def _full_every(vision: Section) -> int:
    """The distance of blocks with full attention: GGUF has one number for them
    (`clip.vision.n_wa_pattern`)."""
    depth = vision.count("depth")
    found = vision.counts("fullatt_block_indexes", below=depth, least=1)
    every = found[0] + 1
    if found != tuple(range(every - 1, depth, every)):
        raise vision.error("fullatt_block_indexes", f"every n-th of {depth} blocks, as GGUF has them")
    return every


def vision_rows(config: ModelConfig) -> Iterator[Mapped]:
    vision, sizes = config.vision, vision_sizes(config.vision)
    norm = (vision.embed_dim,)
    yield from patch_kernels(vision)
    for i in range(vision.depth):
        block, out = f"visual.blocks.{i}.", f"v.blk.{i}."
        yield from split_qkv(vision.embed_dim, block, out)
        for source, name in NORMS:
            yield Mapped(f"{out}{name}.weight", norm, f"{block}{source}.weight")
        yield from pairs(MLP, block, out, sizes)
    yield Mapped("v.post_ln.weight", norm, "visual.merger.ln_q.weight")
    yield from pairs(MERGER[1:], "visual.", "", sizes)


def vision_metadata(config: ModelConfig) -> Metadata:
    vision = config.vision
    assert isinstance(vision, WindowedVisionConfig)
    return {
        **encoder_metadata(vision, IMAGE_SIZE),
        "clip.use_silu": True,
        "clip.vision.n_wa_pattern": vision.full_every,
        "clip.vision.window_size": vision.window_size,
        "qvl.vision.tokens_per_second": vision.tokens_per_second,
    }
