"""What goes into a batch of captions and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qvl.runtime.llama.sampler import Sampling


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
        prompt_tokens: KV cells of the prompt; completion_tokens: of all samples.
        error: why there is no text.
    """

    key: int
    texts: tuple[str, ...] = ()
    finish_reasons: tuple[str, ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    error: str | None = None


@dataclass(frozen=True)
class Request:
    """What all jobs of a run have in common.

    Attributes:
        start: words that begin every reply; the model goes on from them.
        grammar: GBNF that what follows must fit.
    """

    system: str | None = None
    start: str = ""
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 256
    grammar: str | None = None
