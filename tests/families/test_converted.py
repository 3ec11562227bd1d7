"""Checkpoints that transformers saves, converted and shown pictures: the whole way to embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.checkpoint import Shape, Style, special_ids, write_checkpoint
from support.patterns import pattern

from qvl.convert import convert
from qvl.runtime.vision.encoder import VisionEncoder

SIZES = [(64, 64), (100, 190), (260, 130)]


def _saved(family: str, folder: Path) -> Any:
    """A tiny model of transformers, saved with the tests' tokenizer; returns its vision tower."""
    import torch
    import transformers

    torch.manual_seed(0)
    own = (
        {} if family == "qwen2_5_vl" else {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    )
    # what stays of it is its tokenizer and preprocessor
    write_checkpoint(folder, Shape(), Style(preprocessor=own))
    for path in folder.glob("*.safetensors"):
        path.unlink()
    ids = special_ids()
    text = {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 4352, "tie_word_embeddings": True,
    }  # fmt: skip
    common = {"image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"]}
    common |= {"vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"]}
    common |= {"tie_word_embeddings": True}
    vision = {"depth": 4, "hidden_size": 64, "num_heads": 2, "intermediate_size": 96, "out_hidden_size": 128}
    if family == "qwen2_5_vl":
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}
        vision["fullatt_block_indexes"] = [1, 3]
        config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **common)
        model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    else:
        rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [6, 5, 5]}
        text |= {"head_dim": 32, "rope_parameters": {**rope, "mrope_interleaved": True}}
        vision["deepstack_visual_indexes"] = [0, 2]
        config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **common)
        model = transformers.Qwen3VLForConditionalGeneration(config)
    with torch.no_grad():
        for name, weight in model.model.visual.named_parameters():
            weight.normal_(1.0 if weight.ndim == 1 and ("norm" in name or "ln_q" in name) else 0.0, 0.06)
    model.float().save_pretrained(folder)
    return model.model.visual.eval()


@pytest.mark.parity
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_saved_model_sees_as_it_did(family: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    tower = _saved(family, tmp_path / "model")
    made = convert(tmp_path / "model", tmp_path, "f32", "f32")
    with VisionEncoder(made.mmproj, device="cpu") as encoder:
        assert encoder.family.name == family
        for height, width in SIZES:
            patches = encoder.preprocessor.image(pattern(height, width))
            [found] = encoder.encode_patches([patches])
            with torch.no_grad():
                out = tower(torch.from_numpy(patches.pixel_values), torch.tensor([patches.grid_thw]))
            rows = [out.pooler_output, *(getattr(out, "deepstack_features", None) or [])]
            expected = np.asarray(torch.cat(rows, dim=1))
            assert found.embeddings.shape == expected.shape
            error = np.linalg.norm(found.embeddings - expected) / np.linalg.norm(expected)
            assert error < 5e-6, (height, width)
