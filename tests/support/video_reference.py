"""transformers' whole Qwen2-VL on conversations with videos: 4.57, which reads videos by Pillow, or 5.

transformers 5's video processor wants torchvision. There the frames go through its processor of pictures one
by one; a picture's patch holds its frame twice, a video's two frames, so the halves are put together.
Importing this needs torch and transformers.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image
from support.chatml import INSTRUCT_TEMPLATE, Message
from support.video_chats import MIN_PIXELS
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

torch.set_num_threads(1)

IS_4 = transformers.__version__.startswith("4.")
_MERGED = 4
_FRAME = 3 * 2 * 14 * 14
_PAD = re.compile(r"<\|(image|video)_pad\|>")


@lru_cache(maxsize=4)
def model(checkpoint: Path) -> Any:
    return Qwen2VLForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@lru_cache(maxsize=1)
def _processor() -> Any:
    if IS_4:
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

        return Qwen2VLImageProcessor(min_pixels=MIN_PIXELS, max_pixels=12845056)
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(min_pixels=MIN_PIXELS, max_pixels=12845056)


def picture_pixels(frame: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """pixel_values and grid_thw [3] of a picture."""
    made = _processor()(images=[Image.fromarray(frame)], return_tensors="np")
    return made["pixel_values"], made["image_grid_thw"][0]


def video_pixels(frames: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """pixel_values_videos and grid_thw [3] of a video."""
    if IS_4:
        made = _processor()(images=None, videos=[list(frames)], return_tensors="np")
        return made["pixel_values_videos"], made["video_grid_thw"][0]
    singles = [picture_pixels(frame) for frame in frames]
    halves = [values.reshape(-1, 3, 2, _FRAME // 6) for values, _ in singles]
    halves += halves[-1:] * (len(halves) % 2)
    pairs = zip(halves[::2], halves[1::2], strict=True)
    values = [np.stack([a[:, :, 0], b[:, :, 1]], axis=2).reshape(-1, _FRAME) for a, b in pairs]
    return np.concatenate(values), np.array([len(values), *singles[0][1][1:]])


def embeddings(checkpoint: Path, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
    """float32 [n_tokens, n_embd] of a video."""
    values, grid = video_pixels(frames)
    with torch.no_grad():
        out = model(checkpoint).model.visual(torch.from_numpy(values), grid_thw=torch.tensor(grid[None]))
    return np.asarray(getattr(out, "pooler_output", out))


def inputs(checkpoint: Path, messages: list[Message]) -> dict[str, Any]:
    """Input of the model: input_ids, pixel values and grids of pictures and videos."""
    found: dict[str, list[Any]] = {"image": [], "video": []}
    for message in messages:
        for part in message["content"] if isinstance(message["content"], list) else ():
            if part["type"] == "image":
                found["image"].append(picture_pixels(part["image"]))
            elif part["type"] == "video":
                found["video"].append(video_pixels(part["video"]))
    counts = {kind: iter([int(np.prod(grid)) // _MERGED for _, grid in some]) for kind, some in found.items()}
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    prompt = tokenizer.apply_chat_template(
        messages, chat_template=INSTRUCT_TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    prompt = _PAD.sub(lambda match: match[0] * next(counts[match[1]]), prompt)
    given: dict[str, Any] = {"input_ids": tokenizer(prompt, return_tensors="pt")["input_ids"]}
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if found[kind]:
            given[name] = torch.from_numpy(np.concatenate([values for values, _ in found[kind]]))
            given[f"{kind}_grid_thw"] = torch.tensor(np.stack([grid for _, grid in found[kind]]))
    return given


def positions(checkpoint: Path, messages: list[Message]) -> NDArray[np.int32]:
    """int32 [3, n_positions] by `get_rope_index`."""
    given = {k: v for k, v in inputs(checkpoint, messages).items() if not k.startswith("pixel")}
    found, _ = model(checkpoint).model.get_rope_index(**given, **_types(checkpoint, given["input_ids"]))
    return np.asarray(found[:, 0], np.int32)


def logits(
    checkpoint: Path, messages: list[Message], at: NDArray[np.int32] | None = None
) -> NDArray[np.float32]:
    """float32 [n_positions, n_vocab]; `at` are positions [3, n_positions] to take in place of its own."""
    given = inputs(checkpoint, messages)
    given |= _types(checkpoint, given["input_ids"])
    if at is not None:
        given["position_ids"] = torch.from_numpy(at.astype(np.int64))[:, None]
    with torch.no_grad():
        return np.asarray(model(checkpoint)(**given).logits[0])


def _types(checkpoint: Path, input_ids: Any) -> dict[str, Any]:
    """Arguments that transformers 5 needs besides."""
    config = model(checkpoint).config
    image, video = input_ids == config.image_token_id, input_ids == config.video_token_id
    return {} if IS_4 else {"mm_token_type_ids": image.int() + 2 * video.int()}
