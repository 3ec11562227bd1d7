"""Cost of a picture: its resized size, the tokens it takes, and an estimate of the seconds.

A token stands for 28x28 pixels of the resized picture, 32x32 in Qwen3-VL. Encoding grows with the number of
patches, and with its square where attention dominates; prefill grows with the number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from qvl.runtime.vision.preprocess import Preprocessor
from qvl.runtime.vision.tower import Config

_ATTENTION: Final = 1.5  # seconds of an operation in attention, relative to one in a matrix product


@dataclass(frozen=True)
class Throughput:
    """Speed of a model on a machine.

    Attributes:
        patches: of the picture that was timed.
        encode_seconds: for encoding it.
        token_seconds: for prefilling one token.
        measured: false where it is an estimate.
    """

    patches: int
    encode_seconds: float
    token_seconds: float
    measured: bool = True


@dataclass(frozen=True)
class Cost:
    """Cost of a picture or a video.

    Attributes:
        size: (width, height) in pixels after resizing.
        tokens: of the context.
        seconds: to encode and to prefill it, estimated; None where the throughput is not known.
        text_tokens: how many of the tokens are text, the times of a video (Qwen3-VL).
    """

    size: tuple[int, int]
    tokens: int
    seconds: float | None
    text_tokens: int = 0


def work(config: Config, patches: int) -> float:
    """Operations to encode a picture, those of attention weighted by their relative cost."""
    operations = config.operations(patches)
    return operations.products + _ATTENTION * operations.attention


def seconds(config: Config, throughput: Throughput, tokens: int) -> float:
    """Estimated seconds to encode and to prefill a picture of so many tokens."""
    patches = tokens * config.merge_size**2
    encode = throughput.encode_seconds * work(config, patches) / work(config, throughput.patches)
    return encode + tokens * throughput.token_seconds


def cost(
    preprocessor: Preprocessor,
    width: int,
    height: int,
    config: Config | None = None,
    throughput: Throughput | None = None,
) -> Cost:
    """Cost of a picture of this size, in pixels, within the preprocessor's bounds.

    Args:
        config, throughput: to estimate the seconds; without them there are none.
    """
    size = preprocessor.size(height, width)
    tokens = preprocessor.n_tokens(height, width)
    if config is None or throughput is None:
        return Cost(size[::-1], tokens, None)
    return Cost(size[::-1], tokens, seconds(config, throughput, tokens))
