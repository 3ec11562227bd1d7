"""transformers in float32 as the reference; importing this needs the `parity` extra."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel


@lru_cache(maxsize=8)
def vision_tower(checkpoint: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The vision tower of a checkpoint with published tensor names, computing in dtype."""
    config = json.loads((checkpoint / "config.json").read_text())["vision_config"]
    tower = Qwen2VisionTransformerPretrainedModel(Qwen2VLVisionConfig(**config)).float().eval()
    state = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        state.update({k: v.float() for k, v in load_file(file).items() if k.startswith("visual.")})
    tower.load_state_dict({k.removeprefix("visual."): v for k, v in state.items()}, strict=True)
    return tower.to(dtype)


def vision_embeddings(
    checkpoint: Path,
    pixel_values: NDArray[np.float32],
    grids: list[tuple[int, int, int]],
    dtype: torch.dtype = torch.float32,
) -> NDArray[np.float32]:
    """float32 [n_tokens, n_embd] of packed pictures, computed in dtype."""
    pixels = torch.from_numpy(pixel_values).to(dtype)
    with torch.no_grad():
        out = vision_tower(checkpoint, dtype)(pixels, grid_thw=torch.tensor(grids))
    return np.asarray(getattr(out, "pooler_output", out).float())
