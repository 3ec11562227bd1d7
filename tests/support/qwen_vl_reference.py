"""Qwen-VL from a published checkpoint by transformers and torch in float32; needs the `parity` extra.

The decoder is `Qwen2ForCausalLM`: as many key-value heads as heads, c_attn cut into q, k and v, w2 the gate.
Facts: vLLM, model_executor/models/qwen.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from support.families import family_tensors
from support.tower_reference import QwenVLTower, Reference
from support.towers import TowerShape
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

TRAINED: Final = 2048  # config.json, seq_length


def published_state(folder: Path, seed: int = 0) -> Mapping[str, NDArray[np.float32]]:
    """The checkpoint's tensors in float32, as `write_family(…, dtype="F32", seed=seed)` wrote them."""
    return family_tensors(folder, "qwen_vl", dtype="F32", seed=seed)


def decoder(folder: Path, state: Mapping[str, NDArray[np.float32]], theta: float | None = None) -> Any:
    """The decoder; theta is the rotary base in place of the checkpoint's."""
    c = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    hidden = c["hidden_size"]
    config = Qwen2Config(
        hidden_size=hidden,
        intermediate_size=c["intermediate_size"] // 2,
        num_hidden_layers=c["num_hidden_layers"],
        num_attention_heads=c["num_attention_heads"],
        num_key_value_heads=c["num_attention_heads"],
        max_position_embeddings=c["max_position_embeddings"],
        rms_norm_eps=c["layer_norm_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": theta or c["rotary_emb_base"]},
        vocab_size=c["vocab_size"],
        tie_word_embeddings=False,
    )
    own = {
        "model.embed_tokens.weight": state["transformer.wte.weight"],
        "model.norm.weight": state["transformer.ln_f.weight"],
        "lm_head.weight": state["lm_head.weight"],
    }
    for i in range(c["num_hidden_layers"]):
        source, name = f"transformer.h.{i}.", f"model.layers.{i}."
        for kind in ("weight", "bias"):
            thirds = np.split(state[f"{source}attn.c_attn.{kind}"], 3)
            for letter, values in zip("qkv", thirds, strict=True):
                own[f"{name}self_attn.{letter}_proj.{kind}"] = values
        for theirs, ours in (
            ("attn.c_proj", "self_attn.o_proj"), ("mlp.w2", "mlp.gate_proj"), ("mlp.w1", "mlp.up_proj"),
            ("mlp.c_proj", "mlp.down_proj"), ("ln_1", "input_layernorm"),
            ("ln_2", "post_attention_layernorm"),
        ):  # fmt: skip
            own[f"{name}{ours}.weight"] = state[f"{source}{theirs}.weight"]
    model = Qwen2ForCausalLM(config).float().eval()
    model.load_state_dict({name: torch.from_numpy(values) for name, values in own.items()}, strict=True)
    return model


def tower(folder: Path, state: Mapping[str, NDArray[np.float32]]) -> Reference:
    """The vision tower: pixel_values and grids to embedding rows."""
    v = json.loads((folder / "config.json").read_text(encoding="utf-8"))["visual"]
    visual = "transformer.visual."
    own = {k.removeprefix(visual): values for k, values in state.items() if k.startswith(visual)}
    shape = TowerShape(
        "qwen_vl", dim=v["width"], heads=v["heads"], depth=v["layers"], ff=int(v["width"] * v["mlp_ratio"]),
        out=v["output_dim"], out_heads=v["output_dim"] // 128, size=v["image_size"],
        table=math.isqrt(v["n_queries"]),
    )  # fmt: skip
    return QwenVLTower(shape, own)


def ntk_base(n: int, head_dim: int = 128, base: float = 10000.0) -> float:
    """The rotary base of the published code for a prompt of n tokens (dynamic NTK)."""
    alpha = max(2 ** math.ceil(math.log2(n / TRAINED) + 1) - 1, 1)
    return float(base * alpha ** (head_dim / (head_dim - 2)))


@contextmanager
def log_n_queries(model: Any) -> Iterator[None]:
    """Queries at the 1-based position i beyond 2048 times log_2048(i), as in the published code."""

    def scaled(module: nn.Module, inputs: Any, out: torch.Tensor) -> torch.Tensor:
        # a rotation leaves the length of a query as it is, so that the order does not matter
        places = torch.arange(1, out.shape[1] + 1, dtype=torch.float64).clamp(min=TRAINED)
        return out * (places.log() / math.log(TRAINED)).to(out.dtype)[None, :, None]

    with ExitStack() as hooks:
        for layer in model.model.layers:
            hooks.callback(layer.self_attn.q_proj.register_forward_hook(scaled).remove)
        yield
