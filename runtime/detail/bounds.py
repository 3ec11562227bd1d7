"""Bounds on a picture's area: in pixels, or by a level of detail.

"low"   at most 256 tokens, the area of 448x448 (Qwen3-VL: 512x512)
"auto"  as many tokens as are encoded and prefilled within a time budget, at least 256
"high"  the model's own bound
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from qvl.runtime.detail.cost import Throughput, seconds
from qvl.runtime.vision.preprocess import Preprocessor
from qvl.runtime.vision.tower import Config

LOW_TOKENS: Final = 256
BUDGET_SECONDS: Final = 10.0
_MOST_TOKENS: Final = 1 << 20

Detail = Literal["low", "auto", "high"]


@dataclass(frozen=True)
class Bounds:
    """Bounds on a picture's area that a request gives; None keeps the model's own.

    Attributes:
        min_pixels, max_pixels: in pixels after resizing.
        detail: in place of max_pixels, which goes before it.
        default_tokens: at most so many, where neither max_pixels nor detail is given.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None
    detail: Detail | None = None
    default_tokens: int | None = None

    def apply(
        self,
        own: Preprocessor,
        config: Config,
        throughput: Throughput | None = None,
        *,
        n_ctx: int | None = None,
    ) -> Preprocessor:
        """The preprocessor within these bounds.

        Args:
            own: with the model's own bounds.
            throughput, n_ctx: for "auto", see `max_pixels`.

        Raises:
            InputError: a bound under one token's area or over a context's, or the lower over the upper.
        """
        high = self.max_pixels
        if high is None and (self.detail is not None or self.default_tokens is not None):
            if self.detail is not None:
                bound = max_pixels(self.detail, own, config, throughput, n_ctx=n_ctx)
            else:
                bound = min(own.max_pixels, (self.default_tokens or 0) * own.factor**2)
            high = max(bound, self.min_pixels or 0)
        return own.with_pixels(self.min_pixels, high)


def max_pixels(
    detail: Detail,
    preprocessor: Preprocessor,
    config: Config,
    throughput: Throughput | None = None,
    *,
    n_ctx: int | None = None,
    budget: float = BUDGET_SECONDS,
) -> int:
    """The bound on a picture's area that a level of detail stands for, at most the model's own.

    Args:
        preprocessor: with the model's own bounds.
        throughput: for "auto", which without it is "high".
        n_ctx: for "auto": a picture may fill half of so many tokens.
        budget: for "auto", in seconds.
    """
    tokens = preprocessor.max_pixels // preprocessor.factor**2
    if detail == "low":
        tokens = LOW_TOKENS
    elif detail == "auto":
        if throughput is not None:
            tokens = min(tokens, affordable_tokens(config, throughput, budget))
        if n_ctx is not None:
            tokens = max(LOW_TOKENS, min(tokens, n_ctx // 2))
    return min(preprocessor.max_pixels, tokens * preprocessor.factor**2)


def affordable_tokens(config: Config, throughput: Throughput, budget: float = BUDGET_SECONDS) -> int:
    """The most tokens that are encoded and prefilled within so many seconds, at least `LOW_TOKENS`.

    One of 256, 384, 512, 768, 1024, …: small changes of the throughput keep a picture's size, and with it
    its cached embeddings.
    """
    tokens, step = LOW_TOKENS, LOW_TOKENS // 2
    while seconds(config, throughput, tokens + step) <= budget and tokens < _MOST_TOKENS:
        tokens += step
        if tokens & (tokens - 1) == 0:
            step = tokens // 2
    return tokens
