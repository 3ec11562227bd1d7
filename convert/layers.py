"""Layers that several families have: their rows in a checkpoint and in a GGUF file, and their metadata.

Names and cuts are those of llama.cpp's converter (conversion/qwenvl.py, conversion/base.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final, TypeAlias

from qvl.convert.family import Metadata
from qvl.convert.hyperparameters import ModelConfig, Section, TextHyperparameters, VisionHyperparameters
from qvl.convert.rows import Mapped, rows

EPSILON: Final = 1e-6  # fixed in transformers' Qwen2VLVisionBlock; the config has no key for it

Rule: TypeAlias = tuple[str, str, tuple[str, ...]]
"""Name in the checkpoint, name in the file, sizes of the axes."""


def check_heads(vision: Section, width: str) -> tuple[int, int]:
    """The encoder's width and its heads, whose channels rotate in four parts."""
    dim, heads = vision.count(width), vision.count("num_heads")
    if dim % heads or (dim // heads) % 4:
        raise vision.error("num_heads", f"a divisor of {dim} with heads a multiple of 4 wide")
    return dim, heads


def check_layout(vision: Section, config: VisionHyperparameters, channels: str = "in_channels") -> None:
    """Refuse what the GGUF layout has no place for."""
    for key, found, expected in (
        (channels, config.in_channels, 3),
        ("temporal_patch_size", config.temporal_patch_size, 2),
        ("spatial_merge_size", config.spatial_merge_size, 2),
    ):
        if found != expected:
            raise vision.error(key, f"{expected}, which the GGUF layout of this family is made for")


def decoder_rows(text: TextHyperparameters, block: Iterable[Rule]) -> Iterator[Mapped]:
    """A decoder's rows, with the given ones in each layer."""
    sizes = {
        "hidden": text.hidden_size,
        "heads": text.num_attention_heads * text.head_dim,
        "kv": text.num_key_value_heads * text.head_dim,
        "head": text.head_dim,
        "inner": text.intermediate_size,
    }
    embedding, norm = (text.vocab_size, text.hidden_size), (text.hidden_size,)
    yield Mapped("token_embd.weight", embedding, "model.embed_tokens.weight")
    for i in range(text.num_hidden_layers):
        for source, name, axes in block:
            shape = tuple(sizes[axis] for axis in axes)
            yield Mapped(f"blk.{i}.{name}", shape, f"model.layers.{i}.{source}")
    yield Mapped("output_norm.weight", norm, "model.norm.weight")
    if not text.tie_word_embeddings:
        yield Mapped("output.weight", embedding, "lm_head.weight")


def vision_sizes(vision: VisionHyperparameters) -> dict[str, int]:
    """Sizes of the axes that the encoder's rules name."""
    merged = vision.embed_dim * vision.spatial_merge_size**2
    return {"dim": vision.embed_dim, "mlp": vision.mlp_size, "merged": merged, "out": vision.hidden_size}


def patch_kernels(vision: VisionHyperparameters) -> Iterator[Mapped]:
    """The patch embedding's kernels, one for each of two frames."""
    kernel = (vision.embed_dim, vision.in_channels, vision.patch_size, vision.patch_size)
    source = (*kernel[:2], vision.temporal_patch_size, *kernel[2:])
    for name, view in (
        ("v.patch_embd.weight", lambda conv: conv[:, :, 0]),
        ("v.patch_embd.weight.1", lambda conv: conv[:, :, 1]),
    ):
        yield Mapped(name, kernel, "visual.patch_embed.proj.weight", view, source_shape=source)


def split_qkv(dim: int, block: str, out: str) -> Iterator[Mapped]:
    """q, k and v of a block from the thirds of attn.qkv."""
    for part, letter in enumerate("qkv"):
        for kind, shape in (("weight", (dim, dim)), ("bias", (dim,))):
            source, view = (3 * dim, *shape[1:]), rows(part * dim, dim)
            yield Mapped(
                f"{out}attn_{letter}.{kind}", shape, f"{block}attn.qkv.{kind}", view, source_shape=source
            )


def pairs(rules: Iterable[Rule], block: str, out: str, sizes: Mapping[str, int]) -> Iterator[Mapped]:
    """A weight and a bias for every rule; the bias is as long as the weight has rows."""
    for source, name, axes in rules:
        shape = tuple(sizes[axis] for axis in axes)
        yield Mapped(f"{out}{name}.weight", shape, f"{block}{source}.weight")
        yield Mapped(f"{out}{name}.bias", shape[:1], f"{block}{source}.bias")


def decoder_metadata(config: ModelConfig) -> Metadata:
    """The keys that decoders of all families share."""
    text, a = config.text, config.architecture
    metadata: Metadata = {
        f"{a}.block_count": text.num_hidden_layers,
        f"{a}.context_length": text.max_position_embeddings,
        f"{a}.embedding_length": text.hidden_size,
        f"{a}.feed_forward_length": text.intermediate_size,
        f"{a}.attention.head_count": text.num_attention_heads,
        f"{a}.attention.head_count_kv": text.num_key_value_heads,
        f"{a}.rope.freq_base": text.rope_theta,
        f"{a}.attention.layer_norm_rms_epsilon": text.rms_norm_eps,
    }
    if text.mrope_section is not None:
        metadata[f"{a}.rope.dimension_sections"] = [*text.mrope_section, 0]
    if text.yarn is not None:
        metadata |= {
            f"{a}.rope.scaling.type": "yarn",
            f"{a}.rope.scaling.factor": text.yarn.factor,
            f"{a}.rope.scaling.original_context_length": text.yarn.original_max_position_embeddings,
            **{f"{a}.rope.scaling.{key}": value for key, value in text.yarn.constants},
        }
    return metadata


def encoder_metadata(vision: VisionHyperparameters, image_size: int) -> Metadata:
    """The keys that the image encoders of Qwen2-VL and later families share."""
    v = "clip.vision"
    return {
        f"{v}.projection_dim": vision.hidden_size,
        f"{v}.image_size": image_size,
        f"{v}.patch_size": vision.patch_size,
        f"{v}.spatial_merge_size": vision.spatial_merge_size,
        f"{v}.embedding_length": vision.embed_dim,
        f"{v}.feed_forward_length": vision.mlp_size,
        f"{v}.block_count": vision.depth,
        f"{v}.attention.head_count": vision.num_heads,
        f"{v}.attention.layer_norm_epsilon": EPSILON,
        "qvl.vision.temporal_patch_size": vision.temporal_patch_size,
    }
