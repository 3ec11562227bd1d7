"""Conversations with videos that the whole chain is held to: odd counts of frames, several among pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
from support.chatml import Message, assistant, image, system, text, user
from support.patterns import pattern

MIN_PIXELS = 3136


def clip(n: int, height: int, width: int, seed: int = 0) -> dict[str, Any]:
    """A video of n frames, taken as they are, which may be as small as a picture."""
    frames = np.stack([pattern(height, width, seed + i) for i in range(n)])
    return {"type": "video", "video": frames, "min_pixels": MIN_PIXELS}


VIDEO_CHATS: dict[str, list[Message]] = {
    "one frame": [user(clip(1, 56, 84), text("What is this?"))],
    "odd frames": [user(clip(5, 84, 112, 1), text("What happens?"))],
    "even frames": [user(text("Watch: "), clip(4, 120, 90, 2))],
    "longer than wide": [
        user(clip(13, 60, 50, 3), text("How does it end?")), assistant("Well."), user("Yes?"),
    ],
    "videos and pictures": [
        system("You see."),
        user(image(84, 56, 1), clip(3, 60, 100, 4), text("and"), clip(6, 90, 56, 5), text("Which is it?")),
        assistant("The second."),
        user(clip(7, 28, 140, 6), image(57, 83, 2), clip(2, 112, 56, 7), text("Compare all.")),
    ],
}  # fmt: skip


def videos(messages: list[Message]) -> list[dict[str, Any]]:
    """The video parts of a conversation, in order."""
    return [part for m in messages if isinstance(m["content"], list)
            for part in m["content"] if part["type"] == "video"]  # fmt: skip
