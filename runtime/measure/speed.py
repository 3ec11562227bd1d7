"""How fast a model runs on this machine: loading, looking, reading, writing, and the wait for a first token.

Reading and writing are measured as llama-bench does (tools/llama-bench): a prompt of n tokens into an empty
cache, and n tokens one after the other from an empty cache, without sampling.
"""

from __future__ import annotations

import platform
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from qvl.runtime.ggml.devices import default_threads, devices
from qvl.runtime.model import Model

QUESTION: Final = "What is in this picture?"
_FEATURES: Final = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)

Size = tuple[int, int]
"""Width and height in pixels."""


@dataclass(frozen=True)
class Machine:
    """Where the figures come from."""

    system: str
    processor: str
    features: tuple[str, ...]
    threads: int
    devices: tuple[str, ...]


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
    """What `measure` found.

    Attributes:
        encode: by the picture's size: patches and seconds, reading and resizing included.
        read: prompt tokens; write: reply tokens.
        first_token: prompt tokens of a picture and a short question, and seconds to the first token.
        peak_bytes: of the process, at the end.
    """

    encode: dict[Size, Timing] = field(default_factory=dict)
    read: Timing | None = None
    write: Timing | None = None
    first_token: Timing | None = None
    peak_bytes: int = 0


def measure(
    model: Model,
    *,
    sizes: Sequence[Size],
    n_read: int = 512,
    n_write: int = 128,
    runs: int = 3,
    progress: Callable[[float, float, str], None] = lambda done, total, label: None,
) -> Speed:
    """Measure a loaded model; each thing once to warm up and then `runs` times.

    Args:
        sizes: of pictures to encode; the first is used for the first token too. Needs an image encoder.
        progress: called with steps done, steps in all, and what is measured next.
    """
    total = (len(sizes) + 2 + bool(sizes)) * (runs + 1)
    done = 0

    def timed(label: str, amount: int, once: Callable[[int], float]) -> Timing:
        nonlocal done
        seconds = []
        for run in range(runs + 1):
            progress(done, total, label)
            seconds.append(once(run))
            done += 1
        return Timing(amount, tuple(seconds[1:]))

    encode = {
        size: timed(f"picture of {size[0]} x {size[1]}", _n_patches(model, size), _encoder(model, size))
        for size in sizes
    }
    read = timed(f"reading {n_read} tokens", n_read, lambda run: _read(model, n_read))
    write = timed(f"writing {n_write} tokens", n_write, lambda run: _write(model, n_write))
    first = None
    if sizes:
        n_prompt = _first_token(model, sizes[0], -1)[0]
        first = timed("first token", n_prompt, lambda run: _first_token(model, sizes[0], run)[1])
    return Speed(encode, read, write, first, peak_bytes())


def _noise(size: Size, seed: int) -> NDArray[np.uint8]:
    """A picture that nothing can have been kept of."""
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)


def _n_patches(model: Model, size: Size) -> int:
    preprocessor = model.vision.preprocessor
    return preprocessor.n_tokens(size[1], size[0]) * preprocessor.merge_size**2


def _encoder(model: Model, size: Size) -> Callable[[int], float]:
    def once(run: int) -> float:
        picture = _noise(size, run)
        start = time.perf_counter()
        model.vision.encode([picture])
        return time.perf_counter() - start

    return once


def _tokens(model: Model, n: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(0).integers(0, model.text.hparams.n_vocab, n)]


def _read(model: Model, n: int) -> float:
    with model.context(n_ctx=n) as context:
        tokens = _tokens(model, n)
        start = time.perf_counter()
        for i in range(0, n, context.n_batch):
            batch = tokens[i : i + context.n_batch]
            context.decode_tokens(batch, i, outputs="last")
        return time.perf_counter() - start


def _write(model: Model, n: int) -> float:
    with model.context(n_ctx=n) as context:
        tokens = _tokens(model, n)
        start = time.perf_counter()
        for i, token in enumerate(tokens):
            context.decode_tokens([token], i, outputs="last")
        return time.perf_counter() - start


def _first_token(model: Model, size: Size, run: int) -> tuple[int, float]:
    """Prompt tokens, and seconds from a question about a new picture to the first token of the reply."""
    session = model.session()
    try:
        content = [{"type": "image", "image": _noise(size, 1000 + run)}, {"type": "text", "text": QUESTION}]
        start = time.perf_counter()
        stream = session.generate([{"role": "user", "content": content}], max_tokens=1, temperature=0.0)
        reply = stream.result()
        return reply.usage.prompt_tokens, time.perf_counter() - start
    finally:
        session.close()


def peak_bytes() -> int:
    """The most memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def machine() -> Machine:
    """What this machine is."""
    processor = platform.processor() or platform.machine()
    features: tuple[str, ...] = ()
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        info = ""
    if name := re.search(r"^(?:model name|Model)\s*:\s*(.+)$", info, re.M):
        processor = name[1]
    if flags := re.search(r"^(?:flags|Features)\s*:\s*(.+)$", info, re.M):
        features = tuple(f for f in _FEATURES if f in flags[1].split())
    found = tuple(f"{device.name} ({device.description})" for device in devices() if not device.is_cpu)
    return Machine(f"{platform.system()} {platform.machine()}", processor, features, default_threads(), found)
