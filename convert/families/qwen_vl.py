"""Qwen-VL's and Qwen-VL-Chat's checkpoints (arXiv 2308.12966).

The decoder is written as llama.cpp's `qwen2`, with q, k and v apart: `qwen` is the same mathematics, but
fuses them, so that a mixture cannot give values more bits, and fewer programs read it. The image encoder
has a layout of its own (docs/qwen-vl-gguf.md). Names in the checkpoint: vLLM,
model_executor/models/qwen_vl.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from qvl.convert.family import Metadata
from qvl.convert.hyperparameters import ModelConfig, Section, TextHyperparameters, VisionHyperparameters
from qvl.convert.layers import EPSILON, Rule, decoder_metadata, pairs
from qvl.convert.rows import Array, Mapped, View, rows, transposed
from qvl.runtime.families import table

CONTROL_TOKENS: Final = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>"),
    *("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>"),
)
IMAGE_SIZE: Final = 448
MIN_PIXELS: Final = IMAGE_SIZE**2
MAX_PIXELS: Final = IMAGE_SIZE**2
IMAGE_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD: Final = (0.26862954, 0.26130258, 0.27577711)
# The published config.json
DEFAULTS: Final = {"max_position_embeddings": 8192, "rotary_emb_base": 10000, "layer_norm_epsilon": 1e-6}
VISION_DEFAULTS: Final = {"n_queries": 256}

NORMS: Final = (("ln_1.weight", "attn_norm.weight"), ("ln_2.weight", "ffn_norm.weight"))
VISION_BLOCK: Final[tuple[Rule, ...]] = (
    ("attn.out_proj", "attn_out", ("dim", "dim")),
    ("ln_1", "ln1", ("dim",)),
    ("ln_2", "ln2", ("dim",)),
    ("mlp.c_fc", "ffn_up", ("mlp", "dim")),
    ("mlp.c_proj", "ffn_down", ("dim", "mlp")),
)


@dataclass(frozen=True)
class ResamplerVisionConfig(VisionHyperparameters):
    """The image encoder: pictures of a fixed size, and a resampler with learned queries.

    Attributes:
        image_size: side of a picture in pixels.
        query_side: side of the square of queries.
    """

    image_size: int
    query_side: int

    @property
    def resampler_heads(self) -> int:
        """Heads of the cross-attention, 128 wide."""
        return max(1, self.hidden_size // 128)


def read(root: Section) -> ModelConfig:
    root.defaults = DEFAULTS
    hidden, heads = root.count("hidden_size"), root.count("num_attention_heads")
    if hidden % heads:
        raise root.error("num_attention_heads", f"a divisor of {hidden}")
    root.expect("no_bias", True, ", since the GGUF layout has biases in attention alone")
    root.expect("kv_channels", hidden // heads)
    root.expect("rotary_pct", 1.0)
    both = root.count("intermediate_size")
    if both % 2:
        raise root.error("intermediate_size", "an even number: both halves of the MLP")
    text = TextHyperparameters(
        hidden_size=hidden,
        intermediate_size=both // 2,
        num_hidden_layers=root.count("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        vocab_size=root.count("vocab_size"),
        max_position_embeddings=root.count("max_position_embeddings"),
        rms_norm_eps=root.number("layer_norm_epsilon"),
        rope_theta=root.number("rotary_emb_base"),
        mrope_section=None,
        tie_word_embeddings=bool(root.get("tie_word_embeddings")),
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    if "visual" not in root.values:
        raise root.error("visual", "an image encoder's settings: this is Qwen, which reads text alone")
    return ModelConfig(
        table.named("qwen_vl"), "qwen2", text, _vision(root.section("visual", VISION_DEFAULTS))
    )


def _vision(visual: Section) -> ResamplerVisionConfig:
    width, heads, patch = visual.count("width"), visual.count("heads"), visual.count("patch_size")
    size, queries = visual.count("image_size"), visual.count("n_queries")
    if width % heads:
        raise visual.error("heads", f"a divisor of {width}")
    side = round(queries**0.5)
    if side * side != queries:
        raise visual.error("n_queries", "a square number")
    if size % (2 * patch) or size // patch != 2 * side:
        raise visual.error("image_size", f"{2 * side * patch}: two patches of {patch} to a query each way")
    return ResamplerVisionConfig(
        depth=visual.count("layers"),
        embed_dim=width,
        num_heads=heads,
        mlp_size=int(width * visual.number("mlp_ratio")),
        hidden_size=visual.count("output_dim"),
        in_channels=3,
        patch_size=patch,
        spatial_merge_size=1,
        temporal_patch_size=1,
        image_size=size,
        query_side=side,
    )


def text_rows(config: ModelConfig) -> Iterator[Mapped]:
    text = config.text
    hidden, inner, embedding = text.hidden_size, text.intermediate_size, (text.vocab_size, text.hidden_size)
    yield Mapped("token_embd.weight", embedding, "transformer.wte.weight")
    for i in range(text.num_hidden_layers):
        block, out = f"transformer.h.{i}.", f"blk.{i}."
        for source, name in NORMS:
            yield Mapped(out + name, (hidden,), block + source)
        yield from _thirds(hidden, f"{block}attn.c_attn.", f"{out}attn_{{}}.")
        for source, name, shape in (
            ("attn.c_proj.weight", "attn_output.weight", (hidden, hidden)),
            ("mlp.w2.weight", "ffn_gate.weight", (inner, hidden)),  # c_proj(w1(x) * silu(w2(x)))
            ("mlp.w1.weight", "ffn_up.weight", (inner, hidden)),
            ("mlp.c_proj.weight", "ffn_down.weight", (hidden, inner)),
        ):
            yield Mapped(out + name, shape, block + source)
    yield Mapped("output_norm.weight", (hidden,), "transformer.ln_f.weight")
    if not text.tie_word_embeddings:
        yield Mapped("output.weight", embedding, "lm_head.weight")


def _thirds(dim: int, source: str, name: str) -> Iterator[Mapped]:
    """q, k and v, which lie one after the other in one matrix and one bias."""
    for part, letter in enumerate("qkv"):
        for kind, shape in (("weight", (dim, dim)), ("bias", (dim,))):
            whole, view = (3 * dim, *shape[1:]), rows(part * dim, dim)
            yield Mapped(name.format(letter) + kind, shape, source + kind, view, source_shape=whole)


def _by_head(heads: int, part: int) -> View:
    """q, k or v of a matrix or bias whose rows are [heads, 3, head_dim]; [heads, head_dim, …], not yet
    joined."""

    def view(fused: Array) -> Array:
        return fused.reshape(heads, 3, -1, *fused.shape[1:])[:, part]

    return view


def vision_rows(config: ModelConfig) -> Iterator[Mapped]:
    vision, visual = config.vision, "transformer.visual."
    assert isinstance(vision, ResamplerVisionConfig)
    dim, out = vision.embed_dim, vision.hidden_size
    kernel, places = (dim, 3, vision.patch_size, vision.patch_size), (vision.query_side**2, dim)
    queries = (vision.query_side**2, out)
    yield Mapped("v.patch_embd.weight", kernel, f"{visual}conv1.weight")
    yield Mapped("v.position_embd.weight", places, f"{visual}positional_embedding", keep=True)
    yield from pairs((("ln_pre", "v.pre_ln", ("dim",)),), visual, "", {"dim": dim})
    for i in range(vision.depth):
        block, name = f"{visual}transformer.resblocks.{i}.", f"v.blk.{i}."
        for part, letter in enumerate("qkv"):
            for kind, shape in (("weight", (dim, dim)), ("bias", (dim,))):
                view, fused = _by_head(vision.num_heads, part), (3 * dim, *shape[1:])
                source = f"{block}attn.in_proj.{kind}"
                yield Mapped(f"{name}attn_{letter}.{kind}", shape, source, view, source_shape=fused)
        yield from pairs(VISION_BLOCK, block, name, {"dim": dim, "mlp": vision.mlp_size})
    pool = f"{visual}attn_pool."
    yield Mapped("resampler.query", queries, f"{pool}query", keep=True)
    yield Mapped("resampler.pos_embed_k", queries, f"{pool}pos_embed", keep=True)
    yield Mapped("resampler.kv.weight", (out, dim), f"{pool}kv_proj.weight")
    yield from _thirds(out, f"{pool}attn.in_proj_", "resampler.attn.{}.")
    yield from pairs((("attn.out_proj", "attn.out", ("out", "out")),), pool, "resampler.", {"out": out})
    norms: tuple[Rule, ...] = (("ln_q", "ln_q", ("out",)), ("ln_kv", "ln_kv", ("out",)))
    yield from pairs(norms, pool, "resampler.", {"out": out})
    yield from pairs((("ln_post", "resampler.ln_post", ("out",)),), visual, "", {"out": out})
    yield Mapped("resampler.proj.weight", (out, out), f"{visual}proj", transposed)


def text_metadata(config: ModelConfig) -> Metadata:
    return decoder_metadata(config)


def vision_metadata(config: ModelConfig) -> Metadata:
    vision, v = config.vision, "clip.vision"
    assert isinstance(vision, ResamplerVisionConfig)
    return {
        "clip.use_gelu": True,
        f"{v}.image_size": vision.image_size,
        f"{v}.image_min_pixels": vision.image_size**2,
        f"{v}.image_max_pixels": vision.image_size**2,
        f"{v}.patch_size": vision.patch_size,
        f"{v}.embedding_length": vision.embed_dim,
        f"{v}.feed_forward_length": vision.mlp_size,
        f"{v}.block_count": vision.depth,
        f"{v}.attention.head_count": vision.num_heads,
        f"{v}.attention.layer_norm_epsilon": EPSILON,
        f"{v}.projection_dim": vision.hidden_size,
        f"{v}.projector.query_side": vision.query_side,
        f"{v}.projector.head_count": vision.resampler_heads,
    }
