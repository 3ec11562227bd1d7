"""How large to look at a picture: what it costs, and how much of it a time budget buys.

A token stands for 28x28 pixels of the resized picture, 32x32 in Qwen3-VL. Encoding grows with the number
of patches, and with its square where attention takes over; reading grows with the number of tokens.

    "low"   at most 256 tokens, the area of 448x448 (Qwen3-VL: 512x512)
    "auto"  what can be encoded and read within a time budget, and 256 tokens at least
    "high"  as large as the model takes
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from qvl.runtime.vision.preprocess import Preprocessor
from qvl.runtime.vision.tower import Config

LOW_TOKENS: Final = 256
BUDGET_SECONDS: Final = 10.0
_ATTENTION: Final = 1.5  # seconds of an operation in attention, by those of one in a matrix product

Detail = Literal["low", "auto", "high"]


@dataclass(frozen=True)
class Pace:
    """How fast a machine is with a model.

    Attributes:
        patches: of the picture that was timed.
        encode_seconds: for encoding it.
        token_seconds: for reading one token of a prompt.
        measured: rather than estimated.
    """

    patches: int
    encode_seconds: float
    token_seconds: float
    measured: bool = True


@dataclass(frozen=True)
class Cost:
    """What a picture takes.

    Attributes:
        size: width and height in pixels, at which it is looked at.
        tokens: of the context.
        seconds: to encode and to read it, estimated; None where the pace is not known.
    """

    size: tuple[int, int]
    tokens: int
    seconds: float | None


def work(config: Config, patches: int) -> float:
    """Operations to encode a picture, those of attention weighed by their price."""
    operations = config.operations(patches)
    return operations.products + _ATTENTION * operations.attention


def seconds(config: Config, pace: Pace, tokens: int) -> float:
    """Estimated seconds to encode and to read a picture of so many tokens."""
    patches = tokens * config.merge_size**2
    encode = pace.encode_seconds * work(config, patches) / work(config, pace.patches)
    return encode + tokens * pace.token_seconds


def cost(
    preprocessor: Preprocessor,
    width: int,
    height: int,
    config: Config | None = None,
    pace: Pace | None = None,
) -> Cost:
    """What a picture of this size, in pixels, takes within the preprocessor's bounds.

    Args:
        config, pace: for the seconds, if they are to be estimated.
    """
    tall, wide = preprocessor.size(height, width)
    tokens = preprocessor.n_tokens(height, width)
    if config is None or pace is None:
        return Cost((wide, tall), tokens, None)
    return Cost((wide, tall), tokens, seconds(config, pace, tokens))


def affordable_tokens(config: Config, pace: Pace, budget: float = BUDGET_SECONDS) -> int:
    """The most tokens that a budget of seconds pays for, and `LOW_TOKENS` at least.

    One of 256, 384, 512, 768, 1024, …, so that a machine that is a little slower today looks at a picture
    at the size it did yesterday, and finds what it has kept of it.
    """
    tokens, step = LOW_TOKENS, LOW_TOKENS // 2
    while seconds(config, pace, tokens + step) <= budget and tokens < 1 << 20:
        tokens += step
        if tokens & (tokens - 1) == 0:
            step = tokens // 2
    return tokens


def max_pixels(
    detail: Detail,
    preprocessor: Preprocessor,
    config: Config,
    pace: Pace | None = None,
    *,
    n_ctx: int | None = None,
    budget: float = BUDGET_SECONDS,
) -> int:
    """The bound on a picture's area that a detail stands for, never over the model's own.

    Args:
        preprocessor: with the model's own bounds.
        pace: for "auto", which without it is "high".
        n_ctx: for "auto": a picture may fill half of so many tokens.
    """
    tokens = preprocessor.max_pixels // preprocessor.factor**2
    if detail == "low":
        tokens = LOW_TOKENS
    elif detail == "auto":
        if pace is not None:
            tokens = min(tokens, affordable_tokens(config, pace, budget))
        if n_ctx is not None:
            tokens = max(LOW_TOKENS, min(tokens, n_ctx // 2))
    return min(preprocessor.max_pixels, tokens * preprocessor.factor**2)
