"""Qwen3-VL's checkpoints (arXiv 2511.21631), dense ones and mixtures of experts.

Names and cuts are those of llama.cpp's converter (conversion/qwen3vl.py): attn.qkv stays in one piece; an
expert's matrices are published transposed, with gate and up in one, and are split here (transformers 5 may
save them as its modules hold them, not transposed, and tells by the shape); a deepstack merger is named
after the block whose output it takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from qvl.convert.families import qwen2_vl
from qvl.convert.family import Metadata
from qvl.convert.hyperparameters import (
    Experts,
    ModelConfig,
    Section,
    TextHyperparameters,
    VisionHyperparameters,
    read_text,
)
from qvl.convert.layers import (
    Rule,
    check_heads,
    check_layout,
    decoder_metadata,
    decoder_rows,
    encoder_metadata,
    pairs,
    patch_kernels,
    vision_sizes,
)
from qvl.convert.rows import Mapped, View, transposed, whole
from qvl.runtime.families import table

CONTROL_TOKENS: Final = qwen2_vl.CONTROL_TOKENS
MIN_PIXELS: Final = 256 * 256
MAX_PIXELS: Final = 4096 * 4096
IMAGE_MEAN: Final = (0.5, 0.5, 0.5)
IMAGE_STD: Final = (0.5, 0.5, 0.5)

# Qwen3VLTextConfig, Qwen3VLMoeTextConfig and Qwen3VLVisionConfig of transformers 5
TEXT_DEFAULTS: Final = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5e5,
    "mrope_section": (24, 20, 20),
}
MOE_DEFAULTS: Final = {
    **TEXT_DEFAULTS,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": None,
    "moe_intermediate_size": 1408,
    "num_experts_per_tok": 4,
    "num_experts": 60,
}
VISION_DEFAULTS: Final = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 3584,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": (8, 16, 24),
}

ATTENTION: Final[tuple[Rule, ...]] = (
    ("input_layernorm.weight", "attn_norm.weight", ("hidden",)),
    ("self_attn.q_proj.weight", "attn_q.weight", ("heads", "hidden")),
    ("self_attn.q_norm.weight", "attn_q_norm.weight", ("head",)),
    ("self_attn.k_proj.weight", "attn_k.weight", ("kv", "hidden")),
    ("self_attn.k_norm.weight", "attn_k_norm.weight", ("head",)),
    ("self_attn.v_proj.weight", "attn_v.weight", ("kv", "hidden")),
    ("self_attn.o_proj.weight", "attn_output.weight", ("hidden", "heads")),
    ("post_attention_layernorm.weight", "ffn_norm.weight", ("hidden",)),
)
MLP: Final[tuple[Rule, ...]] = (
    ("mlp.gate_proj.weight", "ffn_gate.weight", ("inner", "hidden")),
    ("mlp.up_proj.weight", "ffn_up.weight", ("inner", "hidden")),
    ("mlp.down_proj.weight", "ffn_down.weight", ("hidden", "inner")),
)
VISION_BLOCK: Final[tuple[Rule, ...]] = (
    ("attn.qkv", "attn_qkv", ("three", "dim")),
    ("attn.proj", "attn_out", ("dim", "dim")),
    ("norm1", "ln1", ("dim",)),
    ("norm2", "ln2", ("dim",)),
    ("mlp.linear_fc1", "ffn_up", ("mlp", "dim")),
    ("mlp.linear_fc2", "ffn_down", ("dim", "mlp")),
)
MERGER: Final[tuple[Rule, ...]] = (
    ("merger.norm", "v.post_ln", ("dim",)),
    ("merger.linear_fc1", "mm.0", ("merged", "merged")),
    ("merger.linear_fc2", "mm.2", ("out", "merged")),
)
DEEPSTACK: Final[tuple[Rule, ...]] = (
    ("norm", "norm", ("merged",)),
    ("linear_fc1", "fc1", ("merged", "merged")),
    ("linear_fc2", "fc2", ("out", "merged")),
)


@dataclass(frozen=True)
class DeepstackVisionConfig(VisionHyperparameters):
    """The image encoder.

    Attributes:
        n_positions: learned positions, a square.
        deepstack: blocks whose outputs are merged and added to the decoder's first layers.
    """

    n_positions: int
    deepstack: tuple[int, ...]

    @property
    def image_size(self) -> int:
        """Side in pixels of the picture that the learned positions cover one to one."""
        return math.isqrt(self.n_positions) * self.patch_size


def read(root: Section) -> ModelConfig:
    experts = root.values.get("model_type") == "qwen3_vl_moe"
    section = root.text(MOE_DEFAULTS if experts else TEXT_DEFAULTS)
    section.expect("attention_bias", False, ", since llama.cpp's Qwen3-VL has no such biases")
    text = read_text(root, section)
    # Unlike Qwen2-VL's, the class does not look at text_config's own word on it.
    tied = root.get("tie_word_embeddings")
    text = text if tied is None else replace(text, tie_word_embeddings=bool(tied))
    if experts:
        text = replace(text, experts=_experts(section, text))
    vision = root.section("vision_config", VISION_DEFAULTS)
    vision.expect("hidden_act", "gelu_pytorch_tanh")
    dim, heads = check_heads(vision, "hidden_size")
    depth = vision.count("depth")
    config = DeepstackVisionConfig(
        depth=depth,
        embed_dim=dim,
        num_heads=heads,
        mlp_size=vision.count("intermediate_size"),
        hidden_size=vision.count("out_hidden_size"),
        in_channels=vision.count("in_channels"),
        patch_size=vision.count("patch_size"),
        spatial_merge_size=vision.count("spatial_merge_size"),
        temporal_patch_size=vision.count("temporal_patch_size"),
        n_positions=vision.count("num_position_embeddings"),
        deepstack=vision.counts("deepstack_visual_indexes", below=depth),
    )
    check_layout(vision, config)
    if math.isqrt(config.n_positions) ** 2 != config.n_positions:
        raise vision.error("num_position_embeddings", "a square number")
    return ModelConfig(table.named("qwen3_vl"), "qwen3vlmoe" if experts else "qwen3vl", text, config)


def _experts(section: Section, text: TextHyperparameters) -> Experts:
    section.expect("decoder_sparse_step", 1, ", since llama.cpp's has experts in every layer")
    section.expect("mlp_only_layers", [], ", since llama.cpp's has experts in every layer")
    key = next((k for k in ("num_local_experts", "num_experts") if k in section.values), "num_experts")
    experts = Experts(
        section.count(key), section.count("num_experts_per_tok"), section.count("moe_intermediate_size")
    )
    if experts.used > experts.count:
        raise section.error("num_experts_per_tok", f"at most {experts.count}, the number of experts")
    return experts


def text_rows(config: ModelConfig) -> Iterator[Mapped]:
    experts = config.text.experts
    if experts is None:
        yield from decoder_rows(config.text, (*ATTENTION, *MLP))
        return
    hidden, inner = config.text.hidden_size, experts.intermediate_size
    up, down = (experts.count, inner, hidden), (experts.count, hidden, inner)
    for mapped in decoder_rows(config.text, ATTENTION):
        yield mapped
        if mapped.name.endswith("ffn_norm.weight"):
            out = mapped.name.removesuffix("ffn_norm.weight")
            block = mapped.source.removesuffix("post_attention_layernorm.weight") + "mlp."
            router = (experts.count, hidden)
            yield Mapped(f"{out}ffn_gate_inp.weight", router, f"{block}gate.weight", keep=True)
            both, fused = f"{block}experts.gate_up_proj", (experts.count, hidden, 2 * inner)
            for name, start in (("gate", 0), ("up", inner)):
                half = _half(start, inner)
                also = (experts.count, 2 * inner, hidden), half
                view = _then(transposed, half)
                yield Mapped(f"{out}ffn_{name}_exps.weight", up, both, view, source_shape=fused, also=also)
            source, also = f"{block}experts.down_proj", (down, whole)
            yield Mapped(f"{out}ffn_down_exps.weight", down, source, transposed, source_shape=up, also=also)


def _half(start: int, size: int) -> View:
    """Gate or up of every expert, from [experts, 2 * inner, hidden] to [experts, inner, hidden]."""
    return lambda fused: fused[:, start : start + size]


def _then(first: View, second: View) -> View:
    return lambda source: second(first(source))


def vision_rows(config: ModelConfig) -> Iterator[Mapped]:
    vision = config.vision
    assert isinstance(vision, DeepstackVisionConfig)
    sizes = {**vision_sizes(vision), "three": 3 * vision.embed_dim}
    yield from patch_kernels(vision)
    yield Mapped("v.patch_embd.bias", (vision.embed_dim,), "visual.patch_embed.proj.bias")
    positions = (vision.n_positions, vision.embed_dim)
    yield Mapped("v.position_embd.weight", positions, "visual.pos_embed.weight", keep=True)
    for i in range(vision.depth):
        yield from pairs(VISION_BLOCK, f"visual.blocks.{i}.", f"v.blk.{i}.", sizes)
    for i, block in enumerate(vision.deepstack):
        yield from pairs(DEEPSTACK, f"visual.deepstack_merger_list.{i}.", f"v.deepstack.{block}.", sizes)
    yield from pairs(MERGER, "visual.", "", sizes)


def text_metadata(config: ModelConfig) -> Metadata:
    a, text, vision = config.architecture, config.text, config.vision
    assert isinstance(vision, DeepstackVisionConfig)
    metadata = decoder_metadata(config) | {
        f"{a}.attention.key_length": text.head_dim,
        f"{a}.attention.value_length": text.head_dim,
        f"{a}.n_deepstack_layers": len(vision.deepstack),
    }
    if text.experts is not None:
        metadata |= {
            f"{a}.expert_count": text.experts.count,
            f"{a}.expert_used_count": text.experts.used,
            f"{a}.expert_feed_forward_length": text.experts.intermediate_size,
        }
    return metadata


def vision_metadata(config: ModelConfig) -> Metadata:
    vision = config.vision
    assert isinstance(vision, DeepstackVisionConfig)
    return {
        **encoder_metadata(vision, vision.image_size),
        "clip.use_gelu": True,
        "clip.vision.is_deepstack_layers": [i in vision.deepstack for i in range(vision.depth)],
    }
