"""config.json into typed hyperparameters, whichever way it is laid out.

Published Qwen2-VL checkpoints keep the decoder's keys at the top level and `rope_theta` beside
`rope_scaling`; transformers 5 saves them under `text_config` with one `rope_parameters`. Both give the
same frozen dataclasses, with Hugging Face's names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qvl.convert.checkpoint import read_json
from qvl.runtime.errors import CheckpointError

MODEL_TYPE: Final = "qwen2_vl"
ROPE_TYPES: Final = ("default", "mrope", "yarn")
MAX_COUNT: Final = 1 << 24  # no real size comes near; keeps products and array lengths sane


@dataclass(frozen=True)
class Yarn:
    """YaRN context extension (arXiv 2309.00071), as `rope_scaling` may ask for it."""

    factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class TextConfig:
    """The decoder. Attribute names are those of transformers' `Qwen2VLTextConfig`."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    yarn: Yarn | None = None

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class VisionConfig:
    """The image encoder. Attribute names are those of transformers' `Qwen2VLVisionConfig`.

    `hidden_size` is the decoder's width, into which the merger projects.
    """

    depth: int
    embed_dim: int
    num_heads: int
    mlp_ratio: float
    hidden_size: int
    in_channels: int
    patch_size: int
    spatial_merge_size: int
    temporal_patch_size: int

    @property
    def mlp_size(self) -> int:
        return int(self.embed_dim * self.mlp_ratio)


@dataclass(frozen=True)
class ModelConfig:
    """Both halves of a Qwen2-VL model."""

    text: TextConfig
    vision: VisionConfig


class _Section:
    """Typed reading of one JSON object, with errors that name the file and the key."""

    def __init__(self, path: Path, name: str, values: Mapping[str, Any]) -> None:
        self.path, self.name, self.values = path, name, values

    def error(self, key: str, expected: str) -> CheckpointError:
        found = repr(self.values[key]) if key in self.values else "nothing"
        return CheckpointError(f"{self.path}: {self.name}{key} is {found}, expected {expected}")

    def section(self, key: str, *, optional: bool = False) -> _Section:
        value = self.values.get(key)
        if value is None and optional:
            value = {}
        if not isinstance(value, dict):
            raise self.error(key, "an object")
        return _Section(self.path, f"{self.name}{key}.", value)

    def count(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= MAX_COUNT:
            raise self.error(key, f"a whole number from 1 to {MAX_COUNT}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e30:
            raise self.error(key, "a positive number")
        return float(value)

    def token(self, key: str) -> int | None:
        value = self.values.get(key)
        value = value[0] if isinstance(value, list) and value else value
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_COUNT:
            raise self.error(key, "a token id")
        return value


def read_config(folder: Path) -> ModelConfig:
    """Hyperparameters from `folder/config.json`, flat or nested.

    Raises:
        CheckpointError: the file is missing or damaged, another architecture, values out of range.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: missing", hint="pass the folder that holds the model's config.json")
    root = _Section(path, "", read_json(path))
    if root.values.get("model_type") != MODEL_TYPE:
        raise CheckpointError(
            f"{path}: model_type is {root.values.get('model_type')!r}, expected {MODEL_TYPE!r}",
            hint="only Qwen2-VL checkpoints can be converted",
        )
    text = root.section("text_config") if "text_config" in root.values else root
    vision = _vision(root.section("vision_config"))
    config = ModelConfig(_text(root, text), vision)
    if config.vision.hidden_size != config.text.hidden_size:
        raise CheckpointError(
            f"{path}: vision_config.hidden_size is {vision.hidden_size}, "
            f"expected the decoder's {config.text.hidden_size}"
        )
    return config


def _text(root: _Section, text: _Section) -> TextConfig:
    _expect(text, "hidden_act", "silu")
    hidden, heads = text.count("hidden_size"), text.count("num_attention_heads")
    kv_heads = text.count("num_key_value_heads", heads)
    if hidden % heads or heads % kv_heads:
        raise text.error("num_attention_heads", f"a divisor of {hidden} and a multiple of {kv_heads}")
    layers = text.count("num_hidden_layers")
    _refuse_sliding_window(text, layers)
    rope = text.section("rope_parameters" if "rope_parameters" in text.values else "rope_scaling")
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise rope.error("rope_type" if "rope_type" in rope.values else "type", " or ".join(ROPE_TYPES))
    sections = rope.values.get("mrope_section")
    if (
        not isinstance(sections, list)
        or len(sections) != 3
        or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sections)
        or 2 * sum(sections) != hidden // heads
    ):
        raise rope.error("mrope_section", f"three counts with the sum {hidden // heads // 2}")
    max_positions = text.count("max_position_embeddings")
    theta = rope if "rope_theta" in rope.values else text
    tied = root.values.get("tie_word_embeddings", text.values.get("tie_word_embeddings", False))
    return TextConfig(
        hidden_size=hidden,
        intermediate_size=text.count("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=text.count("vocab_size"),
        max_position_embeddings=max_positions,
        rms_norm_eps=text.number("rms_norm_eps"),
        rope_theta=theta.number("rope_theta"),
        mrope_section=(sections[0], sections[1], sections[2]),
        tie_word_embeddings=bool(tied),
        bos_token_id=text.token("bos_token_id"),
        eos_token_id=text.token("eos_token_id"),
        pad_token_id=text.token("pad_token_id"),
        yarn=Yarn(rope.number("factor"), rope.count("original_max_position_embeddings", max_positions))
        if kind == "yarn"
        else None,
    )


def _vision(vision: _Section) -> VisionConfig:
    _expect(vision, "hidden_act", "quick_gelu")
    embed_dim, heads = vision.count("embed_dim"), vision.count("num_heads")
    if embed_dim % heads or (embed_dim // heads) % 4:
        raise vision.error("num_heads", f"a divisor of {embed_dim} with heads a multiple of 4 wide")
    # "in_chans" is what checkpoints say; transformers' own name is in_channels, with 3 as the default.
    channels = "in_chans" if "in_chans" in vision.values else "in_channels"
    config = VisionConfig(
        depth=vision.count("depth"),
        embed_dim=embed_dim,
        num_heads=heads,
        mlp_ratio=vision.number("mlp_ratio", 4),
        hidden_size=vision.count("hidden_size"),
        in_channels=vision.count(channels, 3),
        patch_size=vision.count("patch_size", 14),
        spatial_merge_size=vision.count("spatial_merge_size", 2),
        temporal_patch_size=vision.count("temporal_patch_size", 2),
    )
    for key, found, expected in (
        (channels, config.in_channels, 3),
        ("temporal_patch_size", config.temporal_patch_size, 2),
        ("spatial_merge_size", config.spatial_merge_size, 2),
    ):
        if found != expected:
            raise vision.error(key, f"{expected}, which the GGUF layout of Qwen2-VL is made for")
    return config


def _expect(section: _Section, key: str, value: str) -> None:
    if section.values.get(key, value) != value:
        raise section.error(key, repr(value))


def _refuse_sliding_window(text: _Section, layers: int) -> None:
    """transformers slides the window only in layers from `max_window_layers` on; GGUF has no such key."""
    if text.values.get("use_sliding_window") and text.count("max_window_layers", layers) < layers:
        raise text.error("use_sliding_window", "false, since llama.cpp has no sliding window for Qwen2-VL")
