"""Speed of a model on this machine: encoding, prefill, generation, and the wait for a first token.

Prefill and generation are measured as llama-bench does (tools/llama-bench): a prompt of n tokens into an
empty cache, and n tokens one after the other from an empty cache, without sampling.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from qvl.runtime.detail.cost import Throughput
from qvl.runtime.llama.context import Context
from qvl.runtime.model import Model
from qvl.runtime.resources import peak_memory

Size = tuple[int, int]
"""Width and height in pixels."""

QUESTION: Final = "What is in this picture?"
PATIENCE: Final = 20.0
"""Seconds after which a thing is not measured once more."""


@dataclass(frozen=True)
class Timing:
    """Repeated measurements of one thing.

    Attributes:
        amount: patches or tokens that were worked on in each.
        seconds: of every repetition.
    """

    amount: int
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def rate(self) -> float:
        """Patches or tokens a second."""
        return self.amount / self.median


@dataclass(frozen=True)
class Speed:
    """Result of `measure`.

    Attributes:
        encode: by the picture's size after resizing: patches and seconds, cutting into patches included.
        read: prompt tokens; write: reply tokens.
        first_token: prompt tokens of a picture and a short question, and seconds to the first token.
        asked: the picture of that question.
        peak_bytes: of the process, at the end.
    """

    encode: dict[Size, Timing] = field(default_factory=dict)
    read: Timing | None = None
    write: Timing | None = None
    first_token: Timing | None = None
    asked: Size | None = None
    peak_bytes: int = 0

    @property
    def throughput(self) -> Throughput | None:
        """For estimates of costs: the picture nearest to 448x448, and prefill."""
        if not self.encode or self.read is None:
            return None
        seen = min(self.encode.values(), key=lambda timing: abs(timing.amount - 1024))
        return Throughput(seen.amount, seen.median, 1 / self.read.rate)


def measure(
    model: Model,
    *,
    sizes: Sequence[Size],
    n_read: int = 512,
    n_write: int = 128,
    repeat: int = 3,
    progress: Callable[[float, float, str], None] = lambda done, total, label: None,
) -> Speed:
    """Measure a loaded model; each thing once to warm up, and then again as often as `PATIENCE` allows.

    Args:
        sizes: of pictures to encode, once where they come to the same after resizing; the first is used
            for the first token too. Needs an image encoder.
        repeat: repetitions at most.
        progress: called with steps done, steps in all, and a label of the next.
    """
    resized = list(dict.fromkeys(_resized(model, size) for size in sizes))
    total, done = len(resized) + 2 + bool(resized), 0

    def timed(label: str, amount: int, once: Callable[[int], float]) -> Timing:
        nonlocal done
        progress(done, total, label)
        timing = Timing(amount, repeated(once, repeat))
        done += 1
        return timing

    encode = {
        size: timed(f"picture of {size[0]} x {size[1]}", _n_patches(model, size), _encoder(model, size))
        for size in resized
    }
    with model.context(n_ctx=n_read) as context:
        read = timed(f"reading {n_read} tokens", n_read, lambda run: read_seconds(context, n_read))
    with model.context(n_ctx=n_write) as context:
        write = timed(f"writing {n_write} tokens", n_write, lambda run: write_seconds(context, n_write))
    first, asked = None, resized[0] if resized else None
    if asked is not None:
        n_prompt = _first_token(model, asked, -1)[0]
        first = timed("first token", n_prompt, lambda run: _first_token(model, asked, run)[1])
    return Speed(encode, read, write, first, asked, peak_memory())


def repeated(once: Callable[[int], float], repeat: int) -> tuple[float, ...]:
    """Seconds that a function returns, called with 0 to warm up, and then with 1 to `repeat`."""
    started = time.perf_counter()
    once(0)
    seconds: list[float] = []
    for run in range(1, repeat + 1):
        if seconds and time.perf_counter() - started > PATIENCE:
            break
        seconds.append(once(run))
    return tuple(seconds)


def noise(size: Size, seed: int) -> NDArray[np.uint8]:
    """A random picture, of which no cache has embeddings: uint8 [h, w, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)


def read_seconds(context: Context, n: int) -> float:
    """Seconds to prefill n tokens into an empty cache, the logits of each batch's last included."""
    context.clear()
    tokens = tokens_of(context, n)
    start = time.perf_counter()
    for i in range(0, n, context.n_batch):
        context.decode_tokens(tokens[i : i + context.n_batch], i, outputs="last")
    return time.perf_counter() - start


def tokens_of(context: Context, n: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(0).integers(0, context.model.hparams.n_vocab, n)]


def write_seconds(context: Context, n: int) -> float:
    """Decoding n tokens one by one from an empty cache, without choosing them."""
    context.clear()
    tokens = tokens_of(context, n)
    start = time.perf_counter()
    for i, token in enumerate(tokens):
        context.decode_tokens([token], i, outputs="last")
    return time.perf_counter() - start


def _resized(model: Model, size: Size) -> Size:
    height, width = model.vision.preprocessor.size(size[1], size[0])
    return width, height


def _n_patches(model: Model, size: Size) -> int:
    preprocessor = model.vision.preprocessor
    return preprocessor.n_tokens(size[1], size[0]) * preprocessor.merge_size**2


def _encoder(model: Model, size: Size) -> Callable[[int], float]:
    def once(run: int) -> float:
        picture = noise(size, run)
        start = time.perf_counter()
        model.vision.encode([picture])
        return time.perf_counter() - start

    return once


def _first_token(model: Model, size: Size, run: int) -> tuple[int, float]:
    """Prompt tokens, and seconds from a question about a new picture to the first token of the reply."""
    session = model.session()
    try:
        content = [{"type": "image", "image": noise(size, 1000 + run)}, {"type": "text", "text": QUESTION}]
        start = time.perf_counter()
        stream = session.generate([{"role": "user", "content": content}], max_tokens=1, temperature=0.0)
        reply = stream.result()
        return reply.usage.prompt_tokens, time.perf_counter() - start
    finally:
        session.close()
