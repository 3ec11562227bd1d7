"""A training state to a checkpoint as Hugging Face lays it out: config, tokenizer, bfloat16 weights.

python -m qvl.models.nano.train.export --state /var/tmp/qvl-nano/last.pt --out models/nano
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from qvl.models.nano.train import vocabulary
from qvl.models.nano.train.model import Config, Nano
from qvl.models.nano.train.optimizer import Flat
from qvl.models.nano.train.vision_input import MAX_PIXELS, MEAN, MIN_PIXELS, STD

NANO = Path(__file__).resolve().parent.parent
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "chat_template.json")


def config_json(c: Config, token: dict[str, int]) -> dict[str, Any]:
    """The flat layout of Qwen/Qwen2-VL-2B's config.json."""
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": token["<|endoftext|>"],
        "eos_token_id": token["<|im_end|>"],
        "vision_start_token_id": token["<|vision_start|>"],
        "vision_end_token_id": token["<|vision_end|>"],
        "vision_token_id": token["<|vision_pad|>"],
        "image_token_id": token["<|image_pad|>"],
        "video_token_id": token["<|video_pad|>"],
        "hidden_act": "silu",
        "hidden_size": c.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": c.intermediate_size,
        "max_position_embeddings": 4096,
        "max_window_layers": c.num_hidden_layers,
        "model_type": "qwen2_vl",
        "num_attention_heads": c.num_attention_heads,
        "num_hidden_layers": c.num_hidden_layers,
        "num_key_value_heads": c.num_key_value_heads,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_theta,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": c.depth,
            "embed_dim": c.embed_dim,
            "mlp_ratio": c.mlp_ratio,
            "num_heads": c.num_heads,
            "in_chans": 3,
            "hidden_size": c.hidden_size,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": list(c.mrope_section)},
        "vocab_size": c.vocab_size,
    }


def load_weights(state: Path, average: bool = True) -> tuple[Config, dict[str, Tensor]]:
    """The float32 parameters of a training state, by published name; heads that only train are left out."""
    config = Config(vocab_size=vocabulary.load(NANO).get_vocab_size())
    flat = Flat(Nano(config), 1)
    source = torch.load(state)["flat"]["average" if average else "master"]
    return config, {
        name: source[a : a + shape.numel()].view(shape).clone()
        for name, (a, shape) in flat.slices.items()
        if not name.startswith("aux.")
    }


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def export(state: Path, out: Path, average: bool = True) -> None:
    config, weights = load_weights(state, average)
    out.mkdir(parents=True, exist_ok=True)
    if out.resolve() != NANO:
        for name in TOKENIZER_FILES:
            (out / name).write_bytes((NANO / name).read_bytes())
    token = vocabulary.load(NANO).get_vocab()
    write_json(out / "config.json", config_json(config, token))
    write_json(
        out / "preprocessor_config.json",
        {
            "min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS, "patch_size": 14, "temporal_patch_size": 2,
            "merge_size": 2, "image_mean": list(MEAN), "image_std": list(STD),
            "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor",
        },
    )  # fmt: skip
    write_json(
        out / "generation_config.json",
        {
            "bos_token_id": token["<|endoftext|>"], "pad_token_id": token["<|endoftext|>"],
            "do_sample": False,
            "eos_token_id": [token["<|im_end|>"], token["<|endoftext|>"]], "repetition_penalty": 1.0,
            "transformers_version": "4.37.0",
        },
    )  # fmt: skip
    tensors = {name: value.bfloat16().contiguous() for name, value in weights.items()}
    save_file(tensors, out / "model.safetensors.tmp", metadata={"format": "pt"})
    (out / "model.safetensors.tmp").chmod(0o644)
    (out / "model.safetensors.tmp").replace(out / "model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--raw", action="store_true", help="the latest weights, not their running average")
    args = parser.parse_args()
    export(args.state, args.out, average=not args.raw)
    print(f"{args.out}: {sum(f.stat().st_size for f in args.out.iterdir() if f.is_file()):,} bytes")


if __name__ == "__main__":
    main()
