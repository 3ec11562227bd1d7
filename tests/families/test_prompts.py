"""Prompts of every family with pictures and videos, token by token, against transformers' processors."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.chatml import INSTRUCT_TEMPLATE, Message, assistant, image, system, text, user
from support.families import write_family
from support.patterns import pattern

from qvl.convert import convert
from qvl.runtime import load
from qvl.runtime.model import Model
from qvl.runtime.vision.video import frame_indices, frame_size

pytestmark = pytest.mark.parity
TEMPLATES = Path(__file__).parents[1] / "fixtures" / "templates"
TEMPLATE = {
    "qwen2_vl": INSTRUCT_TEMPLATE,
    "qwen2_5_vl": INSTRUCT_TEMPLATE,  # the same text
    "qwen3_vl": (TEMPLATES / "Qwen3-VL-Embedding-8B.jinja").read_text(encoding="utf-8"),
}
PROCESSORS = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}


def clip(n: int, rate: float, seed: int = 0, height: int = 90, width: int = 120) -> dict[str, Any]:
    frames = np.stack([pattern(height, width, seed + i) for i in range(n)])
    return {"type": "video", "video": frames, "source_fps": rate}


CHATS: dict[str, list[Message]] = {
    "text": [user("What is in the picture? é 你好")],
    "picture": [user(image(84, 56), text("What?"))],
    "pictures": [
        system("Short."),
        user(image(300, 220, 1), text(" and "), image(70, 410, 2), text("?")),
        assistant("Two."),
        user(text("Then "), image(130, 130, 3)),
    ],
    "video": [user(clip(40, 10.0), text("What happens?"))],
    "odd frames": [user(clip(9, 3.7), text("And?"))],
    "all": [
        user(clip(31, 29.97, 5), image(200, 90, 4), text("Which?")),
        assistant("The first."),
        user(image(40, 300, 6), clip(12, 1.0, 7, 64, 48), text("Sure?")),
    ],
}


def theirs(name: str, folder: Path, model: Model, messages: list[Message]) -> list[int]:
    """Token ids by the chat template, the processor's replacements and the tokenizer of transformers."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    kind = getattr(
        import_module(f"transformers.models.{name}.processing_{name}"), f"{PROCESSORS[name]}Processor"
    )
    processor = kind.__new__(kind)
    processor.image_processor = processor.video_processor = SimpleNamespace(
        merge_size=2, temporal_patch_size=2
    )
    processor.image_token, processor.video_token = "<|image_pad|>", "<|video_pad|>"
    processor.vision_start_token, processor.vision_end_token = "<|vision_start|>", "<|vision_end|>"
    found: dict[str, list[Any]] = {"image_grid_thw": [], "video_grid_thw": [], "video_metadata": []}
    metadata = import_module("transformers.video_utils").VideoMetadata
    for part in parts(messages):
        kind, ours = part["type"], model.vision.preprocessor
        if kind == "image":
            height, width = ours.size(*part["image"].shape[:2])
            n = 2
        else:
            total, rate = len(part["video"]), part["source_fps"]
            indices = frame_indices(total, rate, ours.sampling)
            n = len(indices) + len(indices) % 2
            height, width = frame_size(*part["video"].shape[1:3], len(indices), ours, ours.sampling)
            found["video_metadata"].append(metadata(total, fps=rate, frames_indices=indices))
        grid = np.array([n // 2, height // ours.patch_size, width // ours.patch_size])
        found[f"{kind}_grid_thw"].append(grid)
    prompt = tokenizer.apply_chat_template(
        messages, chat_template=TEMPLATE[name], tokenize=False, add_generation_prompt=True
    )
    # transformers 4.57, which the models were published with, replaces the outer pair of Qwen3-VL's as well
    outer = r"<\|vision_start\|><\|video_pad\|><\|vision_end\|>" if name == "qwen3_vl" else r"<\|video_pad\|>"
    count = {"image": iter(range(99)), "video": iter(range(99))}

    def replaced(match: re.Match[str]) -> str:
        kind = "image" if match[0] == "<|image_pad|>" else "video"
        text: str = getattr(processor, f"replace_{kind}_token")(found, next(count[kind]))
        return text

    ids: list[int] = tokenizer(re.sub(rf"<\|image_pad\|>|{outer}", replaced, prompt))["input_ids"]
    return ids


def parts(messages: list[Message]) -> Iterator[dict[str, Any]]:
    for message in messages:
        if not isinstance(message["content"], str):
            yield from (part for part in message["content"] if part["type"] != "text")


@pytest.mark.parametrize("name", PROCESSORS)
def test_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    folder = write_family(tmp_path / "model", name)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["chat_template"] = TEMPLATE[name]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    files = convert(folder, tmp_path, "q8_0", "q8_0")
    with load(files.text, files.mmproj, device="cpu", n_ctx=256) as model:
        pads = {kind: model.text.vocab.control(f"<|{kind}_pad|>") for kind in ("image", "video")}
        for case, messages in CHATS.items():
            kinds = [part["type"] for part in parts(messages)]
            ids: list[int] = []
            sources: list[str] = []
            for unit in model.template.units(messages, model._store.place):
                if isinstance(unit, int):
                    ids.append(unit)
                    continue
                source = unit.key.split("/")[0]  # a video of Qwen3-VL has a unit for each frame pair
                sources += [source] if source not in sources[-1:] else []
                ids += [pads[kinds[len(sources) - 1]]] * unit.span.n_tokens
            assert ids == theirs(name, folder, model, messages), case
