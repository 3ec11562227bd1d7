"""transformers' whole Qwen2-VL in float32 as the reference; importing this needs the `parity` extra."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from support.chatml import INSTRUCT_TEMPLATE
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor

torch.set_num_threads(1)  # small matrices: more threads only wait for each other


class _Processor(Qwen2VLProcessor):  # type: ignore[misc]
    """The processor without a video processor, which wants torchvision."""

    def check_argument_for_proper_class(self, *_: Any) -> None:
        return None


@lru_cache(maxsize=4)
def tokenizer(checkpoint: Path) -> Any:
    return AutoTokenizer.from_pretrained(checkpoint)


@lru_cache(maxsize=4)
def processor(checkpoint: Path) -> Any:
    images = Qwen2VLImageProcessorPil.from_pretrained(checkpoint)
    return _Processor(images, tokenizer(checkpoint), None, chat_template=INSTRUCT_TEMPLATE)


@lru_cache(maxsize=4)
def model(checkpoint: Path) -> Any:
    return Qwen2VLForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def inputs(checkpoint: Path, messages: Sequence[dict[str, Any]], number_images: bool = False) -> Any:
    """input_ids, pixel_values, image_grid_thw, … of a conversation with its generation header."""
    return processor(checkpoint).apply_chat_template(
        [_with_pil(m) for m in messages], tokenize=True, add_generation_prompt=True, return_dict=True,
        return_tensors="pt", add_vision_id=number_images,
    )  # fmt: skip


def tokens(checkpoint: Path, messages: Sequence[dict[str, Any]], number_images: bool = False) -> list[int]:
    """Token ids of a conversation, pictures as runs of `<|image_pad|>`."""
    return list(inputs(checkpoint, messages, number_images)["input_ids"][0].tolist())


def plain_tokens(checkpoint: Path, text: str) -> list[int]:
    """Tokens of text in which nothing is a control token."""
    return list(tokenizer(checkpoint)(text, split_special_tokens=True)["input_ids"])


def logits(checkpoint: Path, messages: Sequence[dict[str, Any]]) -> NDArray[np.float32]:
    """float32 [n_positions, n_vocab]."""
    with torch.no_grad():
        return np.asarray(model(checkpoint)(**inputs(checkpoint, messages)).logits[0])


def greedy(checkpoint: Path, messages: Sequence[dict[str, Any]], n: int) -> list[int]:
    """n tokens of greedy decoding; the end tokens do not end it."""
    given = inputs(checkpoint, messages)
    out = model(checkpoint).generate(
        **given, do_sample=False, max_new_tokens=n, min_new_tokens=n, repetition_penalty=1.0,
        temperature=None, top_k=None, top_p=None, eos_token_id=-1,
    )  # fmt: skip
    return list(out[0, given["input_ids"].shape[1] :].tolist())


def greedy_reply(
    checkpoint: Path, messages: Sequence[dict[str, Any]], n: int
) -> tuple[list[int], list[float]]:
    """Tokens of the likeliest reply, the one that ends it included, and how far each is ahead of the next."""
    content = messages[0]["content"]
    video = next((part["video"] for part in content if part["type"] == "video"), None)
    given = inputs(checkpoint, messages) if video is None else clip_inputs(checkpoint, messages, video)
    made = model(checkpoint).generate(
        **given, do_sample=False, max_new_tokens=n, output_logits=True, return_dict_in_generate=True
    )
    best = torch.stack(made.logits)[:, 0].topk(2).values
    tokens = made.sequences[0, given["input_ids"].shape[1] :].tolist()
    return tokens, (best[:, 0] - best[:, 1]).tolist()


def clip_inputs(
    checkpoint: Path, messages: Sequence[dict[str, Any]], frames: Sequence[NDArray[np.uint8]]
) -> dict[str, Any]:
    """As `inputs`, of a conversation about one clip, its frames uint8 [h, w, 3] and even in number.

    transformers' video processor wants torchvision. Its image processor doubles a frame to fill a patch's
    two moments: the first of one frame and the second of the next are the patches of the pair.
    """
    single = processor(checkpoint).image_processor([Image.fromarray(f) for f in frames], return_tensors="pt")
    (_, h, w), t = single["image_grid_thw"][0].tolist(), len(frames) // 2
    rows = single["pixel_values"].view(t, 2, h * w, 3, 2, -1)
    pairs = torch.stack((rows[:, 0, :, :, 0], rows[:, 1, :, :, 1]), dim=3)
    text = tokenizer(checkpoint).apply_chat_template(
        messages, chat_template=INSTRUCT_TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    pad = "<|video_pad|>"
    ids = tokenizer(checkpoint)(text.replace(pad, pad * (t * h * w // 4)), return_tensors="pt")["input_ids"]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": 2 * (ids == tokenizer(checkpoint).convert_tokens_to_ids(pad)).int(),
        "pixel_values_videos": pairs.reshape(t * h * w, -1),
        "video_grid_thw": torch.tensor([[t, h, w]]),
    }


def _with_pil(message: dict[str, Any]) -> dict[str, Any]:
    if isinstance(message["content"], str):
        return message
    parts = [
        part | {"image": Image.fromarray(part["image"])} if part["type"] == "image" else part
        for part in message["content"]
    ]
    return message | {"content": parts}
