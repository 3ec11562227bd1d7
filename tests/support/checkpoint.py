"""Random Qwen2-VL checkpoints of any shape, in every layout that is met: numpy only.

The tokenizer is the trimmed one of tests/fixtures/tokenizer, so that a checkpoint takes a few megabytes
and text of its corpus falls into the same pieces as with the published vocabulary.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

TOKENIZER = Path(__file__).resolve().parent.parent / "fixtures" / "tokenizer"
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES_MERGES = 16
BYTES_SIZE = 256 + BYTES_MERGES + 14
# Qwen2-VL-Instruct's template (Apache-2.0), without its image counters.
CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; the defaults make one that converts and answers in a moment."""

    hidden: int = 128
    inner: int = 256
    heads: int = 4
    kv_heads: int = 2
    layers: int = 2
    dim: int = 64
    vision_heads: int = 2
    depth: int = 2
    mlp_ratio: int = 4
    tied: bool = True
    vocab_size: int = 4352
    max_positions: int = 32768


@dataclass(frozen=True)
class Style:
    """Layout of the checkpoint.

    Attributes:
        dtype: of all tensors.
        config: "flat" as published, "nested" as transformers 5 saves it.
        names: "published" (visual.*, model.*) or "modules" (model.visual.*, model.language_model.*).
        tokenizer: "slow" (vocab.json, merges.txt), "fast" (tokenizer.json only), or "bytes" (as slow,
            with little more than the 256 bytes: takes a vocab_size of `BYTES_SIZE` or more).
        shards: one file, or several with an index.
        chat_template: "base" (no roles) or "chatml".
        std: spread of the weights.
    """

    dtype: Literal["F32", "F16", "BF16"] = "F32"
    config: Literal["flat", "nested"] = "flat"
    names: Literal["published", "modules"] = "published"
    tokenizer: Literal["slow", "fast", "bytes"] = "slow"
    shards: int = 1
    chat_template: Literal["base", "chatml"] = "base"
    std: float = 0.06
    seed: int = 0
    preprocessor: Mapping[str, Any] = field(default_factory=dict)


def write_checkpoint(out: Path, shape: Shape | None = None, style: Style | None = None) -> Path:
    """Write a checkpoint into a folder, which is made; returns the folder."""
    shape, style = shape or Shape(), style or Style()
    out.mkdir(parents=True, exist_ok=True)
    ids = special_ids()
    if style.tokenizer == "bytes":
        ids = {token: i - min(ids.values()) + BYTES_SIZE - len(ids) for token, i in ids.items()}
    config = config_json(shape, style, ids)
    _dump(out / "config.json", config)
    _dump(
        out / "generation_config.json",
        {
            "bos_token_id": ids["<|endoftext|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "do_sample": True,
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
            "repetition_penalty": 1.05,
            "temperature": 0.1,
            "top_p": 0.001,
            "top_k": 1,
        },
    )
    _dump(out / "preprocessor_config.json", PREPROCESSOR | dict(style.preprocessor))
    _write_tokenizer(out, style)
    write_weights(out, dict(weights(shape, style)), style)
    return out


PREPROCESSOR: dict[str, Any] = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2VLProcessor",
}


def special_ids() -> dict[str, int]:
    """The special tokens of the trimmed tokenizer."""
    settings = json.loads((TOKENIZER / "tokenizer_config.json").read_text(encoding="utf-8"))
    return {value["content"]: int(i) for i, value in settings["added_tokens_decoder"].items()}


def config_json(shape: Shape, style: Style, ids: Mapping[str, int]) -> dict[str, Any]:
    """config.json, flat or nested."""
    quarter = shape.hidden // shape.heads // 2 // 4
    sections = [shape.hidden // shape.heads // 2 - 2 * (3 * quarter // 2), *[3 * quarter // 2] * 2]
    vision = {
        "depth": shape.depth,
        "embed_dim": shape.dim,
        "mlp_ratio": shape.mlp_ratio,
        "num_heads": shape.vision_heads,
        "in_chans": 3,
        "hidden_size": shape.hidden,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    }
    text: dict[str, Any] = {
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.inner,
        "max_position_embeddings": shape.max_positions,
        "max_window_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-06,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": shape.vocab_size,
    }
    root = {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "tie_word_embeddings": shape.tied,
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
    }
    dtype = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[style.dtype]
    if style.config == "flat":
        rope = {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": sections}}
        return root | text | rope | {"sliding_window": 32768, "torch_dtype": dtype, "vision_config": vision}
    rope = {"mrope_section": sections, "rope_theta": 1e6, "rope_type": "default", "type": "mrope"}
    text |= {"model_type": "qwen2_vl_text", "rope_parameters": rope, "dtype": dtype, "pad_token_id": None}
    vision |= {"model_type": "qwen2_vl_vision", "hidden_act": "quick_gelu", "in_channels": 3}
    return root | {
        "dtype": dtype,
        "text_config": text,
        "vision_config": vision,
        "transformers_version": "5.0.0",
    }


def tensor_shapes(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Published names and shapes."""
    hidden, inner, dim = shape.hidden, shape.inner, shape.dim
    kv = shape.kv_heads * (hidden // shape.heads)
    yield "model.embed_tokens.weight", (shape.vocab_size, hidden)
    for i in range(shape.layers):
        block = f"model.layers.{i}."
        yield block + "input_layernorm.weight", (hidden,)
        yield block + "post_attention_layernorm.weight", (hidden,)
        for name, rows, columns in (
            ("mlp.down_proj", hidden, inner),
            ("mlp.gate_proj", inner, hidden),
            ("mlp.up_proj", inner, hidden),
            ("self_attn.o_proj", hidden, hidden),
        ):
            yield f"{block}{name}.weight", (rows, columns)
        for name, rows in (("q", hidden), ("k", kv), ("v", kv)):
            yield f"{block}self_attn.{name}_proj.weight", (rows, hidden)
            yield f"{block}self_attn.{name}_proj.bias", (rows,)
    yield "model.norm.weight", (hidden,)
    if not shape.tied:
        yield "lm_head.weight", (shape.vocab_size, hidden)
    yield "visual.patch_embed.proj.weight", (dim, 3, 2, 14, 14)
    linear = []
    for i in range(shape.depth):
        block, mlp = f"visual.blocks.{i}.", dim * shape.mlp_ratio
        linear += [(f"{block}attn.proj", dim, dim), (f"{block}attn.qkv", 3 * dim, dim)]
        linear += [(f"{block}mlp.fc1", mlp, dim), (f"{block}mlp.fc2", dim, mlp)]
    linear += [("visual.merger.mlp.0", 4 * dim, 4 * dim), ("visual.merger.mlp.2", hidden, 4 * dim)]
    for name, rows, columns in linear:
        yield f"{name}.weight", (rows, columns)
        yield f"{name}.bias", (rows,)
    norms = [f"visual.blocks.{i}.norm{n}" for i in range(shape.depth) for n in (1, 2)]
    for name in [*norms, "visual.merger.ln_q"]:
        yield f"{name}.weight", (dim,)
        yield f"{name}.bias", (dim,)


def weights(shape: Shape, style: Style) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Named tensors; BF16 as uint16 bit patterns."""
    rng = np.random.default_rng(style.seed)
    for name, size in tensor_shapes(shape):
        values = style.std * rng.standard_normal(size, dtype=np.float32)
        if ("norm" in name or "ln_q" in name) and name.endswith("weight"):
            values = 1 + values
        if style.names == "modules":
            name = name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name
            name = f"model.{name}" if name.startswith("visual.") else name
        yield name, encode(values, style.dtype)


def encode(values: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[Any]:
    """float32 values in a checkpoint's dtype, rounded to nearest even."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return values.astype({"F32": np.float32, "F16": np.float16}[dtype])


def write_weights(out: Path, tensors: Mapping[str, npt.NDArray[Any]], style: Style) -> None:
    """model.safetensors, or shards and their index."""
    names = list(tensors)
    if style.shards == 1:
        write_safetensors(out / "model.safetensors", tensors, style.dtype)
        return
    weight_map = {}
    for k in range(style.shards):
        part = names[k * len(names) // style.shards : (k + 1) * len(names) // style.shards]
        file = f"model-{k + 1:05}-of-{style.shards:05}.safetensors"
        write_safetensors(out / file, {name: tensors[name] for name in part}, style.dtype)
        weight_map.update(dict.fromkeys(part, file))
    size = sum(tensor.nbytes for tensor in tensors.values())
    _dump(out / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})


def write_safetensors(path: Path, tensors: Mapping[str, npt.NDArray[Any]], dtype: str) -> None:
    """One safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor).tobytes())


def _write_tokenizer(out: Path, style: Style) -> None:
    settings = json.loads((TOKENIZER / "tokenizer_config.json").read_text(encoding="utf-8"))
    if style.chat_template == "chatml":
        settings["chat_template"] = CHATML
    if style.tokenizer == "bytes":
        _write_bytes_tokenizer(out, settings)
        return
    if style.tokenizer == "slow":
        shutil.copyfile(TOKENIZER / "vocab.json", out / "vocab.json")
        shutil.copyfile(TOKENIZER / "merges.txt", out / "merges.txt")
        _dump(out / "tokenizer_config.json", settings)
        _dump(out / "chat_template.json", {"chat_template": settings["chat_template"]})
        return
    added = settings.pop("added_tokens_decoder")
    (out / "chat_template.jinja").write_text(settings.pop("chat_template"), encoding="utf-8")
    _dump(out / "tokenizer_config.json", settings)
    _dump(out / "tokenizer.json", tokenizer_json({int(i): value for i, value in added.items()}))


def _write_bytes_tokenizer(out: Path, settings: dict[str, Any]) -> None:
    """The bytes and the first merges: for tests that do not look at text."""
    merges = (TOKENIZER / "merges.txt").read_text(encoding="utf-8").split("\n")[:BYTES_MERGES]
    vocab = json.loads((TOKENIZER / "vocab.json").read_text(encoding="utf-8"))
    tokens = [*(t for t in vocab if len(t) == 1), *(merge.replace(" ", "") for merge in merges)]
    added = settings["added_tokens_decoder"].values()
    settings["added_tokens_decoder"] = {str(len(tokens) + i): value for i, value in enumerate(added)}
    (out / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    _dump(out / "vocab.json", {token: i for i, token in enumerate(tokens)})
    _dump(out / "tokenizer_config.json", settings)


def tokenizer_json(added: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """tokenizer.json as `tokenizers` saves a Qwen2 tokenizer."""
    merges = (TOKENIZER / "merges.txt").read_text(encoding="utf-8").split("\n")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, **value} for i, value in added.items()],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False},
                byte_level,
            ],
        },
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": json.loads((TOKENIZER / "vocab.json").read_text(encoding="utf-8")),
            "merges": [merge.split(" ") for merge in merges if merge],
        },
    }


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
