"""Qwen2-VL's checkpoints (arXiv 2409.12191).

Names and cuts are those of llama.cpp's converter (conversion/qwenvl.py): attn.qkv is cut into q, k and v;
the patch embedding, a convolution over two frames, is cut into one kernel for each frame.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from qvl.convert.family import Metadata
from qvl.convert.hyperparameters import ModelConfig, Section, VisionHyperparameters, read_text
from qvl.convert.layers import (
    Rule,
    check_heads,
    check_layout,
    decoder_metadata,
    decoder_rows,
    encoder_metadata,
    pairs,
    patch_kernels,
    split_qkv,
    vision_sizes,
)
from qvl.convert.rows import Mapped
from qvl.runtime.families import table

CONTROL_TOKENS: Final = (
    *("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
MIN_PIXELS: Final = 56 * 56
MAX_PIXELS: Final = 28 * 28 * 16384
IMAGE_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD: Final = (0.26862954, 0.26130258, 0.27577711)
IMAGE_SIZE: Final = 560  # upstream's placeholder: the model takes any size

# Qwen2VLTextConfig and Qwen2VLVisionConfig of transformers 5
TEXT_DEFAULTS: Final = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "max_window_layers": 80,
    "rope_theta": 1e6,
    "mrope_section": (16, 24, 24),
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
VISION_DEFAULTS: Final = {
    "depth": 32,
    "embed_dim": 1280,
    "hidden_size": 3584,
    "mlp_ratio": 4,
    "num_heads": 16,
    "in_channels": 3,
    "in_chans": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}

TEXT_BLOCK: Final[tuple[Rule, ...]] = (
    ("input_layernorm.weight", "attn_norm.weight", ("hidden",)),
    ("self_attn.q_proj.weight", "attn_q.weight", ("heads", "hidden")),
    ("self_attn.q_proj.bias", "attn_q.bias", ("heads",)),
    ("self_attn.k_proj.weight", "attn_k.weight", ("kv", "hidden")),
    ("self_attn.k_proj.bias", "attn_k.bias", ("kv",)),
    ("self_attn.v_proj.weight", "attn_v.weight", ("kv", "hidden")),
    ("self_attn.v_proj.bias", "attn_v.bias", ("kv",)),
    ("self_attn.o_proj.weight", "attn_output.weight", ("hidden", "heads")),
    ("post_attention_layernorm.weight", "ffn_norm.weight", ("hidden",)),
    ("mlp.gate_proj.weight", "ffn_gate.weight", ("inner", "hidden")),
    ("mlp.up_proj.weight", "ffn_up.weight", ("inner", "hidden")),
    ("mlp.down_proj.weight", "ffn_down.weight", ("hidden", "inner")),
)
VISION_BLOCK: Final[tuple[Rule, ...]] = (
    ("norm1", "ln1", ("dim",)),
    ("attn.proj", "attn_out", ("dim", "dim")),
    ("norm2", "ln2", ("dim",)),
    ("mlp.fc1", "ffn_up", ("mlp", "dim")),
    ("mlp.fc2", "ffn_down", ("dim", "mlp")),
)
MERGER: Final[tuple[Rule, ...]] = (
    ("merger.ln_q", "v.post_ln", ("dim",)),
    ("merger.mlp.0", "mm.0", ("merged", "merged")),
    ("merger.mlp.2", "mm.2", ("out", "merged")),
)


def read(root: Section) -> ModelConfig:
    text = read_text(root, root.text(TEXT_DEFAULTS))
    vision = root.section("vision_config", VISION_DEFAULTS)
    vision.expect("hidden_act", "quick_gelu")
    # "in_chans" is what checkpoints say; transformers' own name is in_channels.
    channels = "in_chans" if "in_chans" in vision.values else "in_channels"
    embed_dim, heads = check_heads(vision, "embed_dim")
    config = VisionHyperparameters(
        depth=vision.count("depth"),
        embed_dim=embed_dim,
        num_heads=heads,
        mlp_size=int(embed_dim * vision.number("mlp_ratio")),
        hidden_size=vision.count("hidden_size"),
        in_channels=vision.count(channels),
        patch_size=vision.count("patch_size"),
        spatial_merge_size=vision.count("spatial_merge_size"),
        temporal_patch_size=vision.count("temporal_patch_size"),
    )
    check_layout(vision, config, channels)
    return ModelConfig(table.named("qwen2_vl"), "qwen2vl", text, config)


def text_rows(config: ModelConfig) -> Iterator[Mapped]:
    yield from decoder_rows(config.text, TEXT_BLOCK)


def vision_rows(config: ModelConfig) -> Iterator[Mapped]:
    vision = config.vision
    sizes = vision_sizes(vision)
    yield from patch_kernels(vision)
    for i in range(vision.depth):
        block, out = f"visual.blocks.{i}.", f"v.blk.{i}."
        yield from split_qkv(vision.embed_dim, block, out)
        yield from pairs(VISION_BLOCK, block, out, sizes)
    yield from pairs(MERGER, "visual.", "", sizes)


def text_metadata(config: ModelConfig) -> Metadata:
    return decoder_metadata(config)


def vision_metadata(config: ModelConfig) -> Metadata:
    return encoder_metadata(config.vision, IMAGE_SIZE)
