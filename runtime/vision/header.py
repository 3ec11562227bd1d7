"""The metadata of vision GGUF files: one table of keys with their kinds and ranges.

Keys are those that llama.cpp's converter writes (gguf-py/gguf/constants.py, `Keys.ClipVision`), and qvl's
own below `qvl.vision`. A value outside its range would make ggml abort, or take all memory; it is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qvl.runtime.errors import GGUFError

HINT: Final = "the file is damaged, or was made for another kind of image encoder"
_EPS: Final = "attention.layer_norm_epsilon"


@dataclass(frozen=True)
class HeaderKey:
    """Type and bounds of a value.

    Attributes:
        kind: of the value, or of each item.
        least, most: bounds, both allowed.
        items: number of values in an array; None for a single value, 0 for any number.
    """

    kind: type
    least: float = 0
    most: float = 1
    items: int | None = None

    def holds(self, value: Any) -> bool:
        """True if a value is of this kind and within the bounds."""
        if self.items is None:
            return self._holds_one(value)
        right_length = isinstance(value, list) and (not self.items or len(value) == self.items)
        return right_length and all(self._holds_one(item) for item in value)

    def _holds_one(self, value: Any) -> bool:
        if self.kind is bool or isinstance(value, bool):
            return self.kind is bool and isinstance(value, bool)
        kinds = (int, float) if self.kind is float else (int,)
        return isinstance(value, kinds) and math.isfinite(value) and self.least <= value <= self.most

    def __str__(self) -> str:
        name = {int: "whole number", float: "number", bool: "truth value"}[self.kind]
        bounds = "" if self.kind is bool else f" from {self.least:g} to {self.most:g}"
        if self.items is None:
            return f"a {name}{bounds}"
        return f"{self.items or 'a list of'} {name}s{bounds}"


KEYS: Final[dict[str, HeaderKey]] = {
    "clip.vision.block_count": HeaderKey(int, 1, 512),
    "clip.vision.embedding_length": HeaderKey(int, 1, 1 << 16),
    "clip.vision.feed_forward_length": HeaderKey(int, 1, 1 << 20),
    "clip.vision.projection_dim": HeaderKey(int, 1, 1 << 16),
    "clip.vision.attention.head_count": HeaderKey(int, 1, 1024),
    f"clip.vision.{_EPS}": HeaderKey(float, 1e-12, 0.1),
    "clip.vision.patch_size": HeaderKey(int, 1, 256),
    "clip.vision.image_size": HeaderKey(int, 1, 1 << 14),
    "clip.vision.spatial_merge_size": HeaderKey(int, 1, 16),
    "clip.vision.window_size": HeaderKey(int, 1, 1 << 14),
    "clip.vision.n_wa_pattern": HeaderKey(int, 1, 512),
    "clip.vision.is_deepstack_layers": HeaderKey(bool, items=0),
    "clip.vision.image_min_pixels": HeaderKey(int, 1, 1 << 31),
    "clip.vision.image_max_pixels": HeaderKey(int, 1, 1 << 31),
    "clip.vision.image_mean": HeaderKey(float, -1e3, 1e3, items=3),
    "clip.vision.image_std": HeaderKey(float, 1e-6, 1e3, items=3),
    "qvl.vision.temporal_patch_size": HeaderKey(int, 1, 16),
    "clip.vision.projector.query_side": HeaderKey(int, 1, 256),
    "clip.vision.projector.head_count": HeaderKey(int, 1, 1024),
}


def value(metadata: Mapping[str, Any], key: str, default: Any = None, *, path: Path | None = None) -> Any:
    """The value of a key of the table.

    Args:
        default: where the key is absent; None requires it.
        path: the file, for the message.

    Raises:
        GGUFError: the key is missing, or its value is of another kind or out of range.
    """
    found = metadata.get(key, default)
    if found is default and default is not None:
        return default
    if not KEYS[key].holds(found):
        where = "" if path is None else f"{path}: "
        raise GGUFError(f"{where}{key} is {found!r}, expected {KEYS[key]}", hint=HINT)
    return found
