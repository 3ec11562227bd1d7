"""Typed hyperparameters of a model, and the reading of config.json's sections into them.

Published Qwen2-VL and Qwen2.5-VL checkpoints keep the decoder's keys at the top level and `rope_theta`
beside `rope_scaling`; Qwen3-VL and transformers 5 save them under `text_config`, the latter with one
`rope_parameters`. All give the same frozen dataclasses, with Hugging Face's names. Keys that are left out
get transformers' class defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from qvl.runtime.errors import CheckpointError
from qvl.runtime.families.table import Family

ROPE_TYPES: Final = ("default", "mrope", "yarn")
MAX_COUNT: Final = 1 << 24  # no real size comes near; keeps products and array lengths sane


@dataclass(frozen=True)
class Yarn:
    """YaRN context extension (arXiv 2309.00071), as `rope_scaling` may ask for it.

    Attributes:
        constants: of beta_fast, beta_slow, attention_factor and extrapolation_factor those that are given, by
            llama.cpp's names; its defaults are transformers'.
    """

    factor: float
    original_max_position_embeddings: int
    constants: tuple[tuple[str, float], ...] = ()


# config.json's names, and those under `rope.scaling.` in GGUF files (conversion/base.py)
YARN_CONSTANTS: Final = (
    ("extrapolation_factor", "yarn_ext_factor"),
    ("attention_factor", "yarn_attn_factor"),
    ("attn_factor", "yarn_attn_factor"),
    ("beta_fast", "yarn_beta_fast"),
    ("beta_slow", "yarn_beta_slow"),
)


@dataclass(frozen=True)
class Experts:
    """A mixture of experts.

    Attributes:
        count: experts in a layer.
        used: experts for a token.
        intermediate_size: width of one expert's MLP.
    """

    count: int
    used: int
    intermediate_size: int


@dataclass(frozen=True)
class TextHyperparameters:
    """The decoder. Attribute names are those of transformers' `Qwen2VLTextConfig`.

    `mrope_section` is None for a decoder with one position for each token.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int] | None
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    yarn: Yarn | None = None
    experts: Experts | None = None


@dataclass(frozen=True)
class VisionHyperparameters:
    """Hyperparameters of image encoders of all families; a family may add its own.

    Attributes:
        embed_dim: width of the encoder.
        mlp_size: width of its MLPs.
        hidden_size: width of the decoder, into which the encoder's output is projected.
    """

    depth: int
    embed_dim: int
    num_heads: int
    mlp_size: int
    hidden_size: int
    in_channels: int
    patch_size: int
    spatial_merge_size: int
    temporal_patch_size: int


@dataclass(frozen=True)
class ModelConfig:
    """Both halves of a model.

    Attributes:
        family: its row of the table.
        architecture: `general.architecture` of the text file.
        left_out: sizes that config.json does not give, for which transformers' defaults stand.
    """

    family: Family
    architecture: str
    text: TextHyperparameters
    vision: VisionHyperparameters
    left_out: tuple[str, ...] = field(default=(), compare=False)


class Section:
    """One JSON object read with types, with errors that name the file and the key.

    Attributes:
        values: what config.json says.
        defaults: of transformers' class, for keys that are left out or null.
        left_out: names of the sizes that were taken from the defaults, shared by all sections of a file.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        values: Mapping[str, Any],
        defaults: Mapping[str, Any] | None = None,
        left_out: list[str] | None = None,
    ) -> None:
        self.path, self.name, self.values = path, name, values
        self.defaults = defaults or {}
        self.left_out: list[str] = [] if left_out is None else left_out

    def error(self, key: str, expected: str) -> CheckpointError:
        found = repr(self.values[key]) if key in self.values else "nothing"
        return CheckpointError(f"{self.path}: {self.name}{key} is {found}, expected {expected}")

    def get(self, key: str) -> Any:
        """The value, or the default where it is left out or null."""
        value = self.values.get(key)
        return self.defaults.get(key) if value is None else value

    def section(self, key: str, defaults: Mapping[str, Any] | None = None) -> Section:
        """The object under a key; an empty one where it is left out or null and there are defaults."""
        value = self.values.get(key)
        if value is None and defaults is not None:
            value = {}
        if not isinstance(value, dict):
            raise self.error(key, "an object")
        return Section(self.path, f"{self.name}{key}.", value, defaults, self.left_out)

    def text(self, defaults: Mapping[str, Any]) -> Section:
        """The decoder's section: `text_config`, or the top level where that is left out or null."""
        if self.values.get("text_config") is not None:
            return self.section("text_config", defaults)
        return Section(self.path, self.name, self.values, defaults, self.left_out)

    def count(self, key: str) -> int:
        value = self.values.get(key)
        if value is None and key in self.defaults:
            self.left_out.append(f"{self.name}{key}")
            value = self.defaults[key]
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= MAX_COUNT:
            raise self.error(key, f"a whole number from 1 to {MAX_COUNT}")
        return value

    def number(self, key: str) -> float:
        value = self.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e30:
            raise self.error(key, "a positive number")
        return float(value)

    def counts(self, key: str, *, below: int, least: int = 0) -> tuple[int, ...]:
        """Rising integers from 0, each below a bound."""
        value = self.get(key)
        if (
            not isinstance(value, list | tuple)
            or not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < below for n in value)
            or list(value) != sorted(set(value))
            or len(value) < least
        ):
            raise self.error(key, f"numbers below {below} in rising order")
        return tuple(value)

    def token(self, key: str) -> int | None:
        value = self.get(key)
        value = value[0] if isinstance(value, list) and value else value
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_COUNT:
            raise self.error(key, "a token id")
        return value

    def expect(self, key: str, value: object, why: str = "") -> None:
        """Refuse any value but one; left out or null stands for the default.

        Raises:
            CheckpointError: another value.
        """
        found = self.values.get(key)
        if found is not None and found != value:
            raise self.error(key, f"{value!r}{why}")


def read_text(root: Section, text: Section) -> TextHyperparameters:
    """A decoder of Qwen2's or Qwen3's kind, without its experts.

    Raises:
        CheckpointError: a value out of range, or one that llama.cpp has no key for.
    """
    text.expect("hidden_act", "silu")
    hidden, heads = text.count("hidden_size"), text.count("num_attention_heads")
    null = "num_key_value_heads" in text.values and text.values["num_key_value_heads"] is None
    kv_heads = heads if null else text.count("num_key_value_heads")
    own = text.get("head_dim") is not None
    if heads % kv_heads or (not own and hidden % heads):
        raise text.error("num_attention_heads", f"a divisor of {hidden} and a multiple of {kv_heads}")
    head_dim = text.count("head_dim") if own else hidden // heads
    layers = text.count("num_hidden_layers")
    _refuse_sliding_window(text, layers)
    rope = text.section("rope_parameters" if "rope_parameters" in text.values else "rope_scaling", {})
    rope.defaults = {"mrope_section": text.defaults["mrope_section"]}
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise rope.error("rope_type" if "rope_type" in rope.values else "type", " or ".join(ROPE_TYPES))
    max_positions = text.count("max_position_embeddings")
    yarn = None
    if kind == "yarn":
        rope.defaults = {**rope.defaults, "original_max_position_embeddings": max_positions}
        given = tuple((key, rope.number(name)) for name, key in YARN_CONSTANTS if rope.get(name) is not None)
        yarn = Yarn(rope.number("factor"), rope.count("original_max_position_embeddings"), given)
    return TextHyperparameters(
        hidden_size=hidden,
        intermediate_size=text.count("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=text.count("vocab_size"),
        max_position_embeddings=max_positions,
        rms_norm_eps=text.number("rms_norm_eps"),
        rope_theta=(rope if "rope_theta" in rope.values else text).number("rope_theta"),
        mrope_section=_sections(rope, head_dim),
        tie_word_embeddings=bool(root.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
        bos_token_id=_token(root, text, "bos_token_id"),
        eos_token_id=_token(root, text, "eos_token_id"),
        pad_token_id=_token(root, text, "pad_token_id"),
        yarn=yarn,
    )


def _sections(rope: Section, head_dim: int) -> tuple[int, int, int]:
    """Numbers of rotary frequencies for time, height and width."""
    sections = rope.get("mrope_section")
    if (
        not isinstance(sections, list | tuple)
        or len(sections) != 3
        or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sections)
        or 2 * sum(sections) != head_dim
    ):
        raise rope.error("mrope_section", f"three counts with the sum {head_dim // 2}")
    return sections[0], sections[1], sections[2]


def _token(root: Section, text: Section, key: str) -> int | None:
    return text.token(key) if text.get(key) is not None else root.token(key)


def _refuse_sliding_window(text: Section, layers: int) -> None:
    """transformers slides the window only in layers from `max_window_layers` on; GGUF has no such key."""
    if text.values.get("use_sliding_window") and text.count("max_window_layers") < layers:
        raise text.error("use_sliding_window", "false, since llama.cpp has no sliding window for this family")
