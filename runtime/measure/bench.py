"""How fast a model is here: what it takes to see a picture, to read a prompt and to write a reply."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from qvl.runtime.llama.batch import Batch
from qvl.runtime.llama.context import Context
from qvl.runtime.model import Model
from qvl.runtime.vision.encoder import VisionEncoder

PREFILL_TOKENS: Final = 512  # as llama-bench's pp512
GENERATE_TOKENS: Final = 32
PATIENCE: Final = 20.0  # seconds after which nothing is repeated
QUESTION: Final = "What is in this picture?"

Size = tuple[int, int]  # width and height in pixels
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Timing:
    """Seconds of repeated runs, after one that does not count."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half of what lies between the fastest and the slowest run, as a share of the median."""
        return (max(self.seconds) - min(self.seconds)) / 2 / self.median


@dataclass(frozen=True)
class Seen:
    """A picture's encoding.

    Attributes:
        size: width and height in pixels, after resizing.
        tokens: what the picture takes of the context.
    """

    size: Size
    tokens: int
    timing: Timing


@dataclass(frozen=True)
class Bench:
    """What was measured of a model.

    Attributes:
        prefill, generate: of so many tokens.
        first_token: from a new picture and a short question to the first token of the reply.
        asked: the picture of that question.
    """

    encode: tuple[Seen, ...]
    prefill_tokens: int
    prefill: Timing
    generate_tokens: int
    generate: Timing
    asked: Size | None
    first_token: Timing

    @property
    def prefill_rate(self) -> float:
        """Tokens a second."""
        return self.prefill_tokens / self.prefill.median

    @property
    def generate_rate(self) -> float:
        """Tokens a second."""
        return self.generate_tokens / self.generate.median


def bench(
    model: Model, sizes: Sequence[Size], repeat: int = 3, progress: Progress = lambda stage: None
) -> Bench:
    """Measure a model.

    Args:
        sizes: of the pictures to encode; those that come to the same after resizing are measured once.
        repeat: runs of each, fewer where they take long.
        progress: told what is being measured.
    """
    seen = tuple(_encodings(model.vision, sizes, repeat, progress)) if model.has_vision else ()
    n_prefill = min(PREFILL_TOKENS, model.n_ctx)
    progress(f"reading {n_prefill} tokens")
    prefill = prefill_timing(model, n_prefill, repeat)
    progress(f"writing {GENERATE_TOKENS} tokens")
    generate = generate_timing(model, GENERATE_TOKENS, repeat)
    asked = next((s.size for s in seen if s.tokens >= 256), seen[-1].size if seen else None)
    progress("answering a question")
    first = first_token_timing(model, asked, repeat)
    return Bench(seen, n_prefill, prefill, GENERATE_TOKENS, generate, asked, first)


def _encodings(
    encoder: VisionEncoder, sizes: Sequence[Size], repeat: int, progress: Progress
) -> Iterator[Seen]:
    resized = {encoder.preprocessor.size(height, width) for width, height in sizes}
    for height, width in sorted(resized, key=lambda size: size[0] * size[1]):
        progress(f"seeing {width}x{height}")

        def run(n: int, width: int = width, height: int = height) -> None:
            encoder.encode([noise(width, height, n)])

        tokens = height * width // encoder.preprocessor.factor**2
        yield Seen((width, height), tokens, repeated(run, repeat))


def prefill_timing(model: Model, n_tokens: int, repeat: int) -> Timing:
    """Reading so many tokens, logits of the last one included."""
    tokens = _tokens(model, n_tokens)
    with model.context(n_ctx=n_tokens, n_batch=n_tokens) as context:

        def run(_: int) -> None:
            context.clear()
            context.decode(Batch.of_tokens(tokens, 0, outputs="last"))
            context.row()

        return repeated(run, repeat)


def generate_timing(model: Model, n_tokens: int, repeat: int) -> Timing:
    """Decoding so many tokens one by one from an empty context, without choosing them."""
    tokens = _tokens(model, n_tokens)
    with model.context(n_ctx=n_tokens) as context:
        return repeated(lambda _: _decode_each(context, tokens), repeat)


def _decode_each(context: Context, tokens: NDArray[np.int32]) -> None:
    context.clear()
    for i in range(len(tokens)):
        context.decode(Batch.of_tokens(tokens[i : i + 1], i, outputs="last"))
        context.row()


def first_token_timing(model: Model, size: Size | None, repeat: int) -> Timing:
    """A question about a new picture, or about none: from asking to the first token."""
    session = model.session()

    def run(n: int) -> None:
        text = {"type": "text", "text": f"{QUESTION} ({n})"}
        image = [] if size is None else [{"type": "image", "image": noise(*size, seed=1000 + n)}]
        stream = session.generate(
            [{"role": "user", "content": [*image, text]}], max_tokens=1, temperature=0.0
        )
        next(stream, None)
        stream.cancel()
        stream.result()

    try:
        return repeated(run, repeat)
    finally:
        session.close()


def repeated(run: Callable[[int], None], repeat: int) -> Timing:
    """Time a function called with 0, which does not count, and then with 1 to `repeat`."""
    started = time.perf_counter()
    run(0)
    seconds: list[float] = []
    for n in range(1, repeat + 1):
        if seconds and time.perf_counter() - started > PATIENCE:
            break
        before = time.perf_counter()
        run(n)
        seconds.append(time.perf_counter() - before)
    return Timing(tuple(seconds))


def noise(width: int, height: int, seed: int) -> NDArray[np.uint8]:
    """A picture that nobody has seen: uint8 [height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def _tokens(model: Model, n: int) -> NDArray[np.int32]:
    return np.random.default_rng(0).integers(0, model.text.hparams.n_vocab, n).astype(np.int32)
