"""Hyperparameters to GGUF keys: the one place that translates names.

Key names are llama.cpp's (gguf-py/gguf/constants.py; tools/mtmd/clip-impl.h). What upstream has no key
for stands under `qvl.`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from qvl.convert.checkpoint import read_json
from qvl.convert.family import Metadata, conversion
from qvl.convert.hyperparameters import ModelConfig
from qvl.convert.vocab import PRE, TokenizerVocab
from qvl.runtime.errors import CheckpointError

QUANTIZATION_VERSION: Final = 2  # GGML_QNT_VERSION
VISION_ARCH: Final = "clip"


def text_metadata(
    config: ModelConfig,
    vocab: TokenizerVocab,
    sampling: Mapping[str, int | float],
    file_type: int,
    general: Metadata,
) -> Metadata:
    """Keys of the text file.

    Args:
        sampling: `generation_defaults`.
        general: `general_metadata`.
    """
    metadata: Metadata = {"general.type": "model", **general}
    metadata |= {key: np.int32(value) if isinstance(value, int) else value for key, value in sampling.items()}
    metadata |= conversion(config.family).text_metadata(config)
    metadata["qvl.family"] = config.family.name  # families share architectures
    metadata |= {"general.file_type": file_type, "general.quantization_version": QUANTIZATION_VERSION}
    return metadata | _tokenizer(vocab)


def _tokenizer(vocab: TokenizerVocab) -> Metadata:
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
    if vocab.eos_token_ids:
        metadata["qvl.tokenizer.eos_token_ids"] = list(vocab.eos_token_ids)
    if vocab.eot_token_id is not None:
        metadata[f"{t}.eot_token_id"] = vocab.eot_token_id
    if vocab.chat_format is not None:
        metadata["qvl.chat_format"] = vocab.chat_format
    metadata[f"{t}.add_bos_token"] = False  # Qwen's tokenizers add nothing
    if vocab.chat_template is not None:
        metadata["tokenizer.chat_template"] = vocab.chat_template
    return metadata


def vision_metadata(
    config: ModelConfig, preprocessor: Mapping[str, Any], file_type: int, general: Metadata
) -> Metadata:
    """Keys of the mmproj file. preprocessor: `read_preprocessor`."""
    return {
        "general.type": "mmproj",
        **general,
        "general.file_type": file_type,
        "general.quantization_version": QUANTIZATION_VERSION,
        "clip.has_vision_encoder": True,
        "clip.projector_type": config.family.projector,
        "clip.vision.image_mean": list(preprocessor["image_mean"]),
        "clip.vision.image_std": list(preprocessor["image_std"]),
        "clip.vision.image_min_pixels": preprocessor["min_pixels"],
        "clip.vision.image_max_pixels": preprocessor["max_pixels"],
        **conversion(config.family).vision_metadata(config),
    }


def read_preprocessor(folder: Path, config: ModelConfig) -> dict[str, Any]:
    """min_pixels, max_pixels, image_mean and image_std from preprocessor_config.json.

    transformers 5 writes the limits as `size` (shortest_edge, longest_edge), and keeps them in
    processor_config.json under `image_processor`, which it prefers to a file that an older version left
    (image_processing_base.py).

    Raises:
        CheckpointError: a damaged file, a value out of bounds, patch sizes other than config.json's.
    """
    path, family = folder / "processor_config.json", conversion(config.family)
    nested = read_json(path).get("image_processor") if path.is_file() else None
    values: dict[str, Any] = nested if isinstance(nested, dict) else {}
    if not values and (folder / "preprocessor_config.json").is_file():
        path = folder / "preprocessor_config.json"
        values = read_json(path)
    size = values.get("size")
    size = size if isinstance(size, dict) else {}
    result: dict[str, Any] = {
        "min_pixels": values.get("min_pixels") or size.get("shortest_edge") or family.MIN_PIXELS,
        "max_pixels": values.get("max_pixels") or size.get("longest_edge") or family.MAX_PIXELS,
        "image_mean": values.get("image_mean") or family.IMAGE_MEAN,
        "image_std": values.get("image_std") or family.IMAGE_STD,
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
    """Name, source repository, and the licence of the model card."""
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
