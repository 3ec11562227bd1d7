"""Hyperparameters to GGUF keys: the one place that translates names.

Key names are llama.cpp's (gguf-py/gguf/constants.py; tools/mtmd/clip-impl.h). What upstream has no key
for stands under `qvl.`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from qvl.convert.checkpoint import read_json
from qvl.convert.config import ModelConfig, TextConfig
from qvl.convert.vocab import PRE, Vocab
from qvl.runtime.errors import CheckpointError

Value = bool | int | float | str | Sequence[str] | Sequence[int] | Sequence[float] | np.int32
Metadata = dict[str, Value]

TEXT_ARCH: Final = "qwen2vl"
VISION_ARCH: Final = "clip"
PROJECTOR: Final = "qwen2vl_merger"
QUANTIZATION_VERSION: Final = 2  # GGML_QNT_VERSION
# What Qwen publishes, for a checkpoint without preprocessor_config.json.
MIN_PIXELS: Final = 56 * 56
MAX_PIXELS: Final = 28 * 28 * 16384
IMAGE_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD: Final = (0.26862954, 0.26130258, 0.27577711)
IMAGE_SIZE: Final = 560  # upstream's placeholder: the model takes any size


def text_metadata(
    config: TextConfig, vocab: Vocab, sampling: Mapping[str, int | float], file_type: int, general: Metadata
) -> Metadata:
    """Keys of the text file. general: `general_metadata`."""
    a = TEXT_ARCH
    metadata: Metadata = {"general.type": "model", **general}
    for name, value in sampling.items():
        metadata[f"general.sampling.{name}"] = np.int32(value) if isinstance(value, int) else value
    metadata |= {
        f"{a}.block_count": config.num_hidden_layers,
        f"{a}.context_length": config.max_position_embeddings,
        f"{a}.embedding_length": config.hidden_size,
        f"{a}.feed_forward_length": config.intermediate_size,
        f"{a}.attention.head_count": config.num_attention_heads,
        f"{a}.attention.head_count_kv": config.num_key_value_heads,
        f"{a}.rope.dimension_sections": [*config.mrope_section, 0],
        f"{a}.rope.freq_base": config.rope_theta,
        f"{a}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    }
    if config.yarn is not None:
        metadata |= {
            f"{a}.rope.scaling.type": "yarn",
            f"{a}.rope.scaling.factor": config.yarn.factor,
            f"{a}.rope.scaling.original_context_length": config.yarn.original_max_position_embeddings,
        }
    metadata |= {"general.file_type": file_type, "general.quantization_version": QUANTIZATION_VERSION}
    return metadata | _tokenizer(vocab)


def _tokenizer(vocab: Vocab) -> Metadata:
    t = "tokenizer.ggml"
    metadata: Metadata = {
        f"{t}.model": "gpt2",
        f"{t}.pre": PRE,
        f"{t}.tokens": vocab.tokens,
        f"{t}.token_type": [int(kind) for kind in vocab.types],
        f"{t}.merges": vocab.merges,
    }
    for name, token_id in (
        ("bos", vocab.bos_token_id),
        ("eos", vocab.eos_token_id),
        ("padding", vocab.pad_token_id),
    ):
        if token_id is not None:
            metadata[f"{t}.{name}_token_id"] = token_id
    metadata[f"{t}.add_bos_token"] = False  # Qwen's tokenizers add nothing
    if vocab.chat_template is not None:
        metadata["tokenizer.chat_template"] = vocab.chat_template
    return metadata


def vision_metadata(
    config: ModelConfig, preprocessor: Mapping[str, Any], file_type: int, general: Metadata
) -> Metadata:
    """Keys of the mmproj file. preprocessor: `read_preprocessor`."""
    vision, v = config.vision, "clip.vision"
    return {
        "general.type": "mmproj",
        **general,
        "general.file_type": file_type,
        "general.quantization_version": QUANTIZATION_VERSION,
        "clip.has_vision_encoder": True,
        "clip.projector_type": PROJECTOR,
        f"{v}.projection_dim": config.text.hidden_size,
        f"{v}.image_size": IMAGE_SIZE,
        f"{v}.patch_size": vision.patch_size,
        f"{v}.spatial_merge_size": vision.spatial_merge_size,
        f"{v}.embedding_length": vision.embed_dim,
        f"{v}.feed_forward_length": vision.mlp_size,
        f"{v}.block_count": vision.depth,
        f"{v}.attention.head_count": vision.num_heads,
        # 1e-6 is fixed in transformers' Qwen2VLVisionBlock; the config has no key for it.
        f"{v}.attention.layer_norm_epsilon": 1e-6,
        f"{v}.image_mean": list(preprocessor["image_mean"]),
        f"{v}.image_std": list(preprocessor["image_std"]),
        f"{v}.image_min_pixels": preprocessor["min_pixels"],
        f"{v}.image_max_pixels": preprocessor["max_pixels"],
        "qvl.vision.temporal_patch_size": vision.temporal_patch_size,
    }


def read_preprocessor(folder: Path, config: ModelConfig) -> dict[str, Any]:
    """min_pixels, max_pixels, image_mean and image_std from preprocessor_config.json.

    transformers 5 writes the limits as `size` (shortest_edge, longest_edge), and may keep them in
    processor_config.json under `image_processor`.

    Raises:
        CheckpointError: a damaged file, a value out of bounds, patch sizes other than config.json's.
    """
    path = folder / "preprocessor_config.json"
    values: dict[str, Any] = {}
    if path.is_file():
        values = read_json(path)
    elif (folder / "processor_config.json").is_file():
        path = folder / "processor_config.json"
        section = read_json(path).get("image_processor")
        values = section if isinstance(section, dict) else {}
    size = values.get("size")
    size = size if isinstance(size, dict) else {}
    result: dict[str, Any] = {
        "min_pixels": values.get("min_pixels") or size.get("shortest_edge") or MIN_PIXELS,
        "max_pixels": values.get("max_pixels") or size.get("longest_edge") or MAX_PIXELS,
        "image_mean": values.get("image_mean") or IMAGE_MEAN,
        "image_std": values.get("image_std") or IMAGE_STD,
    }
    low, high = result["min_pixels"], result["max_pixels"]
    if not (isinstance(low, int) and isinstance(high, int) and 0 < low <= high < 1 << 31):
        raise CheckpointError(f"{path}: min_pixels {low!r} and max_pixels {high!r}, expected 0 < min <= max")
    for key, smallest in (("image_mean", -1e9), ("image_std", 0.0)):
        found = result[key]
        three = isinstance(found, list | tuple) and len(found) == 3
        if not three or not all(isinstance(x, int | float) and smallest < x < 1e9 for x in found):
            raise CheckpointError(f"{path}: {key} is {found!r}, expected three numbers")
        result[key] = [float(x) for x in found]
    vision = config.vision
    for key, expected in (
        ("patch_size", vision.patch_size),
        ("temporal_patch_size", vision.temporal_patch_size),
        ("merge_size", vision.spatial_merge_size),
    ):
        if values.get(key, expected) != expected:
            raise CheckpointError(f"{path}: {key} is {values[key]!r}, expected {expected} by config.json")
    return result


def general_metadata(folder: Path, name: str, repo: str | None) -> Metadata:
    """Who made this: name, where it came from, and the licence of the model card."""
    metadata: Metadata = {"general.name": name}
    if repo is not None:
        metadata["general.source.repo_url"] = f"https://huggingface.co/{repo}"
    card = folder / "README.md"
    if card.is_file():
        head = card.read_bytes()[:65536].decode("utf-8", "replace")
        front = re.match(r"---\n(.*?)\n---", head, re.DOTALL)
        licence = re.search(r"^license:\s*(\S+)\s*$", front[1], re.MULTILINE) if front else None
        if licence:
            metadata["general.license"] = licence[1].strip("\"'")
    return metadata
