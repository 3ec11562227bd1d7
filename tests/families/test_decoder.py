"""Random decoders, converted by qvl, against transformers in float32: logits, greedy tokens, positions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.checkpoint import Style, write_checkpoint

from qvl.convert import convert
from qvl.runtime import load
from qvl.runtime.engine.units import Unit, VisionUnit
from qvl.runtime.prompt.positions import TextSpan, mrope_positions

pytestmark = pytest.mark.parity
KINDS = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
FPS = 6 / 7  # what is taken of seven frames, one a second: an even number of them
TEXT = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
}  # fmt: skip
QWEN3: dict[str, Any] = {
    "head_dim": 64,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 5e6, "mrope_section": [12, 10, 10], "mrope_interleaved": True,
    },
}  # fmt: skip
TEXTS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
    },
    "qwen3_vl": QWEN3,
    "qwen3_vl_moe": {**QWEN3, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
}
VISION = {"hidden_size": 64, "out_hidden_size": 128, "intermediate_size": 96, "num_heads": 4}
VISIONS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {
        **VISION,
        "depth": 2,
        "window_size": 112,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
    },
    "qwen3_vl": {**VISION, "depth": 4, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1, 2]},
}


def checkpoint(kind: str, folder: Path) -> tuple[Any, Path]:
    """A random model in transformers, and its folder with tokenizer files."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    base = write_checkpoint(folder / "base", None, Style(chat_template="chatml"))
    published = json.loads((base / "config.json").read_text())
    ids = {
        f"{name}_token_id": published[f"{name}_token_id"]
        for name in ("image", "video", "vision_start", "vision_end")
    }
    prefix = {"qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL", "qwen3_vl_moe": "Qwen3VLMoe"}[kind]
    config = getattr(transformers, f"{prefix}Config")(
        text_config={
            **TEXT,
            **TEXTS[kind],
            "vocab_size": published["vocab_size"],
            "tie_word_embeddings": False,
        },
        vision_config=VISIONS[kind.removesuffix("_moe")],
        tie_word_embeddings=False,
        **ids,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for name, values in model.named_parameters():
            if values.ndim > 1:
                values.normal_(0, 0.08)
            elif "norm" in name or "ln_q" in name:
                values.uniform_(0.5, 1.5)
            else:
                values.normal_(0, 0.1)
    out = folder / kind
    model.save_pretrained(out)
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "chat_template.json"):
        if (base / name).is_file():
            shutil.copy(base / name, out / name)
    return model, out


def messages() -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (140, 100, 3), dtype=np.uint8)
    frames = [rng.integers(0, 256, (64, 96, 3), dtype=np.uint8) for _ in range(7)]
    video = {"type": "video", "video": frames, "fps": 1.0, "source_fps": 1.0}
    words = [{"type": "text", "text": text} for text in ("What is it?", "And that?")]
    return [{"role": "user", "content": [{"type": "image", "image": picture}, words[0], video, words[1]]}]


def inputs(units: Sequence[Unit], config: Any) -> tuple[dict[str, Any], Any]:
    """What transformers takes for the same prompt, and the kind of each token."""
    import torch

    ids: list[int] = []
    kinds: list[int] = []
    seen: tuple[list[Any], list[Any]] = ([], [])
    for unit in units:
        if isinstance(unit, int):
            ids.append(unit)
            kinds.append(0)
            continue
        assert unit.source is not None
        kind = 1 if seen[0] else 0  # the picture comes first
        seen[kind].append(unit.source())
        ids += [(config.image_token_id, config.video_token_id)[kind]] * unit.span.n_tokens
        kinds += [kind + 1] * unit.span.n_tokens
    arrays: dict[str, Any] = {"input_ids": torch.tensor([ids])}
    for patches, name, grid in zip(
        seen, ("pixel_values", "pixel_values_videos"), ("image", "video"), strict=True
    ):
        arrays[name] = torch.from_numpy(np.concatenate([p.pixel_values for p in patches]))
        arrays[f"{grid}_grid_thw"] = torch.tensor([p.grid_thw for p in patches])
    return arrays, torch.tensor([kinds])


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def greedy(model: Any, arrays: dict[str, Any], positions: Any, ends: frozenset[int]) -> list[int]:
    import torch

    reply: list[int] = []
    with torch.no_grad():
        out = model(**arrays, position_ids=positions, use_cache=True)
        at = int(positions.max()) + 1
        while (token := int(out.logits[0, -1].argmax())) not in ends and len(reply) < 64:
            reply.append(token)
            where = torch.full((3, 1, 1), at)
            cache = out.past_key_values
            out = model(
                input_ids=torch.tensor([[token]]), position_ids=where, past_key_values=cache, use_cache=True
            )
            at += 1
    return reply


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_greedy_tokens(kind: str, tmp_path: Path) -> None:
    reference, folder = checkpoint(kind, tmp_path)
    import torch

    files = convert(folder, tmp_path / "gguf", "f32", "f32")
    with load(files.text, files.mmproj, device="cpu", kv_type="f32", precision="exact", n_ctx=2048) as model:
        assert model.family == kind.removesuffix("_moe")
        units = model.template.units(messages(), model._store.place)
        spans = [unit.span if isinstance(unit, VisionUnit) else TextSpan(1) for unit in units]
        positions = torch.from_numpy(mrope_positions(spans)[0]).long()[:, None]  # type: ignore[arg-type]
        arrays, kinds = inputs(units, reference.config)
        grids = (arrays["image_grid_thw"], arrays["video_grid_thw"])
        times = {"second_per_grid_ts": torch.tensor([2 / FPS])} if kind == "qwen2_5_vl" else {}
        # the video is wider than long, so that all versions of transformers agree
        assert torch.equal(
            reference.model.get_rope_index(arrays["input_ids"], kinds, *grids, **times)[0], positions
        )
        with torch.no_grad():
            expected = log_softmax(reference(**arrays, position_ids=positions).logits[0].numpy())
        found = log_softmax(model.logits(messages()))
        divergence = (np.exp(expected) * (expected - found)).sum(-1)
        assert divergence.max() <= 1e-5
        assert (expected.argmax(-1) == found.argmax(-1)).mean() >= 0.999
        reply = model.generate(messages(), max_tokens=64, temperature=0.0).result()
        assert list(reply.tokens) == greedy(reference, arrays, positions, model.text.vocab.end_tokens)
