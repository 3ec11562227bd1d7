"""The pace of a model on this machine: estimated, refined by what is really encoded, and kept."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from qvl.runtime.atomic import write_whole
from qvl.runtime.detail.cost import Pace, work
from qvl.runtime.files import default_directory, file_identity, parse_json
from qvl.runtime.llama.context import Context
from qvl.runtime.native import kernels
from qvl.runtime.resources import default_threads
from qvl.runtime.vision.tower import Config

if TYPE_CHECKING:
    from qvl.runtime.model import Model

_SIDE: Final = 224
_TOKENS: Final = 64
_RUNS: Final = 2
_PATCHES: Final = 1024
_FEWEST_PATCHES: Final = 128
# Operations a second of a core, by our kernels' level: rough figures of 2 to 4 GHz machines, to begin with
_RATES: Final = {"avx512bf16": 3.5e11, "avx512vnni": 2.5e11, "avxvnni": 1.2e11, "avx2": 8e10, "neon": 6e10}
_PLAIN_RATE: Final = 4e10
_GPU_RATE: Final = 5e12
_WEIGHTS_A_BYTE: Final = 1.6  # of a file in 4 to 5 bits
_MAX_BYTES: Final = 1 << 20


def measure_pace(model: Model) -> Pace:
    """Encode a small picture and read a short prompt, a few times: the fastest counts."""
    vision = model.vision
    height, width = vision.preprocessor.size(_SIDE, _SIDE)
    encode = []
    for run in range(_RUNS + 1):
        picture = noise((width, height), run)
        start = time.perf_counter()
        vision.encode([picture])
        encode.append(time.perf_counter() - start)
    with model.context(n_ctx=_TOKENS) as context:
        read = [read_seconds(context, _TOKENS) for _ in range(_RUNS + 1)]
    patches = (height // vision.preprocessor.patch_size) * (width // vision.preprocessor.patch_size)
    return Pace(patches, min(encode), min(read) / _TOKENS)


def known_pace(model: Model, path: Path | None = None) -> Pace:
    """What was measured before of these files on these devices with so many threads, else an estimate.

    Nothing is measured here, so that no prompt waits for it; `refined` makes an estimate exact.

    Args:
        path: the JSON file that keeps it; by default beside the embeddings.
    """
    return stored_pace(model, path) or estimated_pace(model)


def estimated_pace(model: Model) -> Pace:
    """A guess from the processor's instructions, its cores and the sizes of the files."""
    vision = model.vision
    cores = model.threads or default_threads()
    level = kernels()
    rate = cores * _RATES.get(level.name if level else "", _PLAIN_RATE)
    if not vision.device.is_cpu:
        rate = _GPU_RATE
    encode = work(vision.config, _PATCHES) / rate
    return Pace(_PATCHES, encode, 2 * _WEIGHTS_A_BYTE * model.path.stat().st_size / rate, measured=False)


def refined(pace: Pace, config: Config, patches: int, seconds: float) -> Pace:
    """The pace after a picture of so many patches took so many seconds to encode.

    A measurement replaces an estimate; a faster one replaces a slower one, and a slower one counts half, so
    that a moment in which the machine was busy does not last.
    """
    if patches < _FEWEST_PATCHES:  # overhead, not pace
        return pace
    found = seconds * work(config, pace.patches) / work(config, patches)
    if pace.measured and found > pace.encode_seconds:
        found = (found + pace.encode_seconds) / 2
    tokens = pace.token_seconds if pace.measured else pace.token_seconds * found / pace.encode_seconds
    return Pace(pace.patches, found, tokens)


def stored_pace(model: Model, path: Path | None = None) -> Pace | None:
    """What was measured before of these files on these devices with so many threads; None if nothing was."""
    kept = _read(path or _default_path()).get(_key(model))
    if not isinstance(kept, dict):
        return None
    with suppress(TypeError, ValueError):
        pace = Pace(**kept)
        if pace.patches > 0 and pace.encode_seconds > 0 <= pace.token_seconds:
            return pace
    return None


def keep_pace(model: Model, pace: Pace, path: Path | None = None) -> None:
    """Keep it for `known_pace`, in place of what was kept."""
    path = path or _default_path()
    with suppress(OSError):  # without a place to keep it, it is measured again next time
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = {name: value for name, value in asdict(pace).items() if name != "measured"}
        write_whole(path, json.dumps({**_read(path), _key(model): kept}, indent=1))


def _default_path() -> Path:
    return default_directory().parent / "pace.json"


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_BYTES:
            return {}
        kept = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _key(model: Model) -> str:
    vision = model.vision
    decoder = model.text.devices[0].name if model.text.devices else "CPU"
    parts = (
        file_identity(vision.path),
        vision.precision,
        vision.device.name,
        file_identity(model.path),
        decoder,
        str(model.threads or default_threads()),
    )
    return " ".join(parts)


Size = tuple[int, int]
"""Width and height in pixels."""


def noise(size: Size, seed: int) -> NDArray[np.uint8]:
    """A picture that nothing can have been kept of: uint8 [h, w, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)


def read_seconds(context: Context, n: int) -> float:
    """Reading n tokens into an empty cache, the logits of each batch's last included."""
    context.clear()
    tokens = tokens_of(context, n)
    start = time.perf_counter()
    for i in range(0, n, context.n_batch):
        context.decode_tokens(tokens[i : i + context.n_batch], i, outputs="last")
    return time.perf_counter() - start


def tokens_of(context: Context, n: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(0).integers(0, context.model.hparams.n_vocab, n)]
