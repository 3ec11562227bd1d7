"""Options of a video's sampling."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from qvl.runtime.vision.grid import TOKEN_PIXELS


@dataclass(frozen=True)
class VideoOptions:
    """Options of sampling; defaults are Qwen2-VL's, a family has its own in `Preprocessor.sampling`.

    Attributes:
        fps: frames to take a second.
        min_frames, max_frames: bounds of their number; a shorter video gives what it has.
        min_pixels, max_pixels: bounds of a frame's area after resizing, in pixels.
        total_pixels: bound of the area of all frames over two (of all tokens), in pixels.
        source_fps: frames a second of a folder or list of frames; None takes them as sampled already.
        by_volume: Qwen3-VL's rules: the number of frames may be odd, and frames are sized so that all of
            them together stay within total_pixels.
    """

    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    min_pixels: int = 128 * TOKEN_PIXELS
    max_pixels: int = 768 * TOKEN_PIXELS
    total_pixels: int = 24576 * TOKEN_PIXELS
    source_fps: float | None = None
    by_volume: bool = False

    def given(self, values: Iterable[tuple[str, float]]) -> VideoOptions:
        """These options with those that a message gives beside its video."""
        changes: dict[str, Any] = {n: value if n.endswith("fps") else int(value) for n, value in values}
        return replace(self, **changes)
