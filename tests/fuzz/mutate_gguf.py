"""Mutations of GGUF files.

Some break a file, and must be refused; others change it consistently (a dimension everywhere, the number of
layers with their tensors, a type with its data), so that checks of sizes against each other hold and what
lies behind them is reached.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from functools import lru_cache
from random import Random
from typing import Final

from fuzz.gguf_parts import (
    ARRAY,
    BLOCKS,
    DOUBLE,
    FLOAT,
    FORMS,
    INTEGER_KINDS,
    SIZES,
    STRING,
    GGUFParts,
    Pair,
    text,
)
from fuzz.mutate import INTEGERS, mutate_bytes

F32, F16 = 0, 1
REALS: Final = (0.0, -0.0, -1.0, 1e-45, 1e-30, 1e-6, 0.5, 1.0, 2.0, 1e6, 1e30, float("inf"), float("-inf"),
                float("nan"))  # fmt: skip
WEIGHTS: Final = (0.0, -0.0, -1.0, 1e-7, 1.0, 100.0, 6e4, float("inf"), float("-inf"), float("nan"))
TEXTS: Final = (
    b"", b"x", b"\xff\xfe", b"\0", b"x" * 9000, b"{{", b"{% for %}", b"clip", b"gpt2", b"llama", b"qwen2",
    b"qwen2vl", b"qwen3vl", b"qwen3vlmoe", b"qwen", b"default", b"yarn", b"longrope", b"<|im_end|>",
    b"qwen2vl_merger", b"qwen2.5vl_merger", b"qwen3vl_merger", b"silu", b"F32",
)  # fmt: skip
# what llama.cpp reads for some architecture (src/llama-arch.cpp, LLM_KV_NAMES), without the architecture
KNOWN: Final = (
    "attention.causal", "attention.clamp_kqv", "attention.head_count_kv", "attention.key_length",
    "attention.layer_norm_epsilon", "attention.max_alibi_bias", "attention.output_scale",
    "attention.scale", "attention.shared_kv_layers", "attention.sliding_window",
    "attention.sliding_window_pattern", "attention.temperature_scale", "attention.value_length",
    "attention.key_length_swa", "attn_logit_softcapping", "block_count", "classifier.output_labels",
    "classifier.pooling_type", "context_length", "decoder_block_count", "deepstack_mapping",
    "embedding_length", "embedding_length_out", "embedding_scale", "expert_count",
    "expert_feed_forward_length", "expert_gating_func", "expert_group_count", "expert_group_scale",
    "expert_group_used_count", "expert_shared_count", "expert_shared_feed_forward_length",
    "expert_used_count", "expert_weights_norm", "expert_weights_scale", "feed_forward_length",
    "final_logit_softcapping", "full_attention_interval", "hidden_activation", "interleave_moe_layer_step",
    "leading_dense_block_count", "logit_scale", "moe_every_n_layers", "n_deepstack_layers",
    "nextn_predict_layers", "num_loops", "pooling_type", "residual_scale", "rope.dimension_count",
    "rope.dimension_count_swa", "rope.dimension_sections", "rope.freq_base", "rope.freq_base_swa",
    "rope.scale_linear", "rope.scaling.alpha", "rope.scaling.attn_factor", "rope.scaling.factor",
    "rope.scaling.finetuned", "rope.scaling.original_context_length", "rope.scaling.type",
    "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_log_multiplier", "ssm.group_count", "tensor_data_layout", "use_parallel_residual",
    "vocab_size", "wkv.head_size", "vision.image_size", "vision.n_wa_pattern", "vision.window_size",
    "vision.wa_layer_indexes", "vision.is_deepstack_layers", "vision.spatial_merge_size",
    "vision.image_min_pixels", "vision.image_max_pixels", "vision.image_mean", "vision.image_std",
    "vision.projector.scale_factor", "vision.attention.layer_norm_epsilon", "vision.projection_dim",
    "vision.feed_forward_length", "vision.patch_size", "has_vision_encoder", "projector_type", "use_gelu",
    "use_silu",
)  # fmt: skip
GENERAL: Final = (
    "general.alignment", "general.file_type", "general.quantization_version", "general.type", "general.name",
    "general.sampling.top_k", "general.sampling.temp", "general.sampling.penalty_last_n", "split.count",
    "split.no", "split.tensors.count", "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token",
    "tokenizer.ggml.add_space_prefix", "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id", "tokenizer.ggml.eos_token_ids",
    "tokenizer.ggml.padding_token_id", "tokenizer.ggml.unknown_token_id", "tokenizer.ggml.mask_token_id",
    "tokenizer.ggml.fim_pre_token_id", "tokenizer.ggml.pre", "tokenizer.ggml.model", "tokenizer.ggml.scores",
    "tokenizer.ggml.precompiled_charsmap", "tokenizer.ggml.remove_extra_whitespaces",
    "tokenizer.ggml.suppress_tokens", "tokenizer.ggml.token_type_count", "tokenizer.chat_template",
    "tokenizer.chat_templates", "tokenizer.chat_template.default", "qvl.vision.temporal_patch_size",
)  # fmt: skip


def mutate_gguf(data: bytes, rng: Random) -> bytes:
    """One mutation of a file, or up to three."""
    parts = _parsed(data).copy()
    if rng.random() < 0.15:
        return mutate_bytes(data, rng, parts.end)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        rng.choices(*_WEIGHTED)[0](parts, rng)
    return parts.pack()


@lru_cache(maxsize=16)
def _parsed(data: bytes) -> GGUFParts:
    return GGUFParts(data)


# what breaks a file ----------------------------------------------------------------------------------------


def change_pair(parts: GGUFParts, rng: Random) -> None:
    """Remove, repeat, retype or replace the value of a key."""
    if not parts.pairs:
        return
    i = rng.randrange(len(parts.pairs))
    pair = parts.pairs[i]
    match rng.randrange(9):
        case 0:
            del parts.pairs[i]
        case 1:
            parts.pairs.append(pair)
        case 2:
            kind, raw = any_value(rng, rng.choice((*SIZES, STRING, ARRAY)))
            parts.pairs[i] = Pair(pair.key, kind, raw)
        case 3:
            other = rng.choice(parts.pairs)
            parts.pairs[i] = Pair(pair.key, other.kind, other.raw)
        case _ if pair.kind == ARRAY:
            parts.pairs[i] = Pair(pair.key, ARRAY, change_array(pair.raw, rng))
        case _ if pair.integer is not None:
            near = (pair.integer - 1, pair.integer + 1, pair.integer * 2, pair.integer // 2, -pair.integer)
            pair = parts.pairs[i] = Pair(pair.key, pair.kind, pair.raw)
            pair.put(rng.choice((*near, rng.choice(INTEGERS))))
        case _:
            parts.pairs[i] = Pair(pair.key, *any_value(rng, pair.kind))


def add_pair(parts: GGUFParts, rng: Random) -> None:
    """A key that llama.cpp knows and the file did not have, or has with another value."""
    name = rng.choice(KNOWN) if rng.random() < 0.7 else rng.choice(GENERAL)
    if name in KNOWN:
        architecture = next((p.raw[8:] for p in parts.pairs if p.key == b"general.architecture"), b"clip")
        name = f"{architecture.decode('latin-1')}.{name}"
    key = name.encode("latin-1")
    parts.pairs = [pair for pair in parts.pairs if pair.key != key]
    parts.pairs.append(Pair(key, *any_value(rng, rng.choice((4, 4, 5, 6, 7, 8, 9, 10)))))


def change_tensor(parts: GGUFParts, rng: Random) -> None:
    """Remove or rename a tensor, or change its type, place or shape, and nothing else."""
    if not parts.tensors:
        return
    i = rng.randrange(len(parts.tensors))
    part = parts.tensors[i]
    match rng.randrange(8):
        case 0:
            del parts.tensors[i]
        case 1:
            part.kind = rng.choice((*range(42), 999, 1 << 31))
        case 2:
            part.offset = rng.choice((0, 1, 32, part.offset + 32, 1 << 40, (1 << 64) - 32))
        case 3:
            part.offset = rng.choice(parts.tensors).offset  # two on one place
        case 4:
            part.shape = tuple(rng.choice((0, 1, d, d + 1, d * 2, 1 << 31, 1 << 62)) for d in part.shape)
        case 5:
            part.shape = part.shape[::-1] if rng.random() < 0.5 else (*part.shape, rng.choice((1, 2)))[:4]
        case 6:
            part.name = rng.choice((b"", b"x" * 63, b"x" * 70, b"\xff", rng.choice(parts.tensors).name))
        case 7:
            parts.tensors[i] = rng.choice(parts.tensors)


def change_array(raw: bytes, rng: Random) -> bytes:
    """Another length or another element, of the same kind."""
    inner, n = struct.unpack_from("<IQ", raw)
    body = raw[12:]
    if inner == STRING:
        items, at = [], 0
        for _ in range(n):
            (size,) = struct.unpack_from("<Q", body, at)
            items.append(body[at : at + 8 + size])
            at += 8 + size
    else:
        width = SIZES.get(inner, 4)
        items = [body[k * width : (k + 1) * width] for k in range(n)]
    at = rng.randrange(n) if n else 0
    match rng.randrange(6):
        case 0:
            items = items[:at]
        case 1:
            items = items + items[:1]
        case 2 if items:
            del items[at]
        case 3 if items:
            items[at] = rng.choice(items)
        case 4:
            items = []
        case _ if items:
            items[at] = any_value(rng, inner)[1]
    return struct.pack("<IQ", inner, len(items)) + b"".join(items)


def any_value(rng: Random, kind: int) -> tuple[int, bytes]:
    """A kind and a value of it."""
    if kind == STRING:
        return kind, text(rng.choice(TEXTS))
    if kind == ARRAY:
        inner = rng.choice((0, 4, 5, 6, 7, 8, 9))
        n = rng.choice((0, 1, 2, 3, 4, 7))
        body = b"".join(any_value(rng, inner if inner != ARRAY else 4)[1] for _ in range(n))
        return kind, struct.pack("<IQ", inner, rng.choice((n, n, n, n, 1 << 30))) + body
    if kind in (FLOAT, DOUBLE):
        return kind, struct.pack(FORMS[kind], rng.choice(REALS))
    width = SIZES[kind]
    return kind, (rng.choice(INTEGERS) & ((1 << 8 * width) - 1)).to_bytes(width, "little")


# what leaves it consistent ---------------------------------------------------------------------------------


def change_dimension(parts: GGUFParts, rng: Random) -> None:
    """Replace a size in all shapes and in all metadata that has it, and lay the data out anew."""
    sizes = {d for part in parts.tensors for d in part.shape if d > 1}
    if not sizes:
        return
    old = rng.choice(sorted(sizes))
    new = rng.choice((1, 2, 3, 4, 8, 31, 32, 64, 96, 256, 257, old - 1, old + 1, old + 32, old * 2, old // 2))
    everywhere = rng.random() < 0.8
    factors = {old: new, 3 * old: 3 * new, 4 * old: 4 * new} if everywhere else {old: new}
    for part in parts.tensors:
        part.shape = tuple(factors.get(d, d) for d in part.shape)
        per_block, _ = BLOCKS.get(part.kind, (1, 1))
        if part.shape and part.shape[0] % per_block:
            part.kind = F16
    if everywhere:
        for pair in parts.pairs:
            if pair.integer in factors and not pair.key.startswith(b"tokenizer."):
                pair.put(factors[pair.integer])
    parts.lay_out()


def change_layers(parts: GGUFParts, rng: Random) -> None:
    """Another number of blocks, with or without their tensors."""
    pattern = re.compile(rb"(.*blk\.)(\d+)(\..*)")
    found = [m for part in parts.tensors if (m := pattern.fullmatch(part.name))]
    n = 1 + max((int(m[2]) for m in found), default=0)
    wanted = rng.choice((0, 1, n - 1, n + 1, n * 2, 511, 512, 513))
    keep = {p.name for p in parts.tensors if not (m := pattern.fullmatch(p.name)) or int(m[2]) < wanted}
    parts.tensors = [part for part in parts.tensors if part.name in keep]
    if n < wanted <= 2 * n:
        for part in list(parts.tensors):
            if m := pattern.fullmatch(part.name):
                name = b"%s%d%s" % (m[1], int(m[2]) + n, m[3])
                if int(m[2]) + n < wanted:
                    parts.tensors.append(type(part)(name, part.shape, part.kind, 0, part.data))
    if rng.random() < 0.9:
        for pair in parts.pairs:
            if pair.key.endswith(b"block_count") and pair.integer is not None:
                pair.put(wanted)
    parts.lay_out()


def change_type(parts: GGUFParts, rng: Random) -> None:
    """Another type of one tensor or of all matrices, with data to match."""
    if not parts.tensors:
        return
    kind = rng.choice(sorted(BLOCKS))
    chosen = (
        [rng.choice(parts.tensors)] if rng.random() < 0.5 else [t for t in parts.tensors if len(t.shape) > 1]
    )
    for part in chosen:
        if part.shape and part.shape[0] % BLOCKS[kind][0] == 0:
            part.kind = kind
    parts.lay_out()


def change_weights(parts: GGUFParts, rng: Random) -> None:
    """Weights that are no numbers, infinite, zero or enormous."""
    for part in rng.sample(parts.tensors, min(len(parts.tensors), rng.choice((1, 2, 1000)))):
        if part.kind in (F32, F16):
            one = struct.pack("<f" if part.kind == F32 else "<e", rng.choice(WEIGHTS))
            part.data = one * (len(part.data) // len(one))
        else:
            part.data = rng.choice((b"\xff", b"\x7f", b"\0", b"\x7c")) * len(part.data)
    parts.lay_out()


def set_integer(parts: GGUFParts, rng: Random) -> None:
    """A small number in place of a size or count: most are in range, and few fit the rest of the file."""
    integers = [pair for pair in parts.pairs if pair.integer is not None and pair.kind in INTEGER_KINDS]
    if integers:
        rng.choice(integers).put(rng.choice((0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 28, 32, 33, 64, 100, 1000)))


_WEIGHTED: Final[tuple[list[Callable[[GGUFParts, Random], None]], list[int]]] = (
    [change_pair, add_pair, change_tensor, change_dimension, change_layers, change_type, change_weights,
     set_integer],
    [26, 12, 16, 14, 5, 9, 8, 10],
)  # fmt: skip
