"""Captions of many pictures at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Job:
    """A prepared picture with its prompt.

    Attributes:
        key: the caller's, returned with the result.
        frames: uint8 [n, h, w, 3], resized to the encoder's size.
        before, after: the user's words before and after the picture.
        seeds: one for each sample.
    """

    key: int
    frames: NDArray[np.uint8]
    kind: Literal["image", "video"]
    before: str
    after: str
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Done:
    """What came of a job.

    Attributes:
        texts, finish_reasons: one for each sample.
        error: why there is no text.
    """

    key: int
    texts: tuple[str, ...] = ()
    finish_reasons: tuple[str, ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    error: str | None = None
