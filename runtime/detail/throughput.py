"""Throughput of a model on this machine: estimated, refined by real encodings, kept in a JSON file."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qvl.runtime.atomic import write_whole
from qvl.runtime.detail.cost import Throughput, work
from qvl.runtime.files import default_directory, file_identity, parse_json
from qvl.runtime.native import kernels
from qvl.runtime.resources import default_threads
from qvl.runtime.vision.tower import Config

if TYPE_CHECKING:
    from qvl.runtime.model import Model

_PATCHES: Final = 1024
_FEWEST_PATCHES: Final = 128
# Operations a second of a core, by our kernels' level: rough figures of 2 to 4 GHz machines, for an estimate
_RATES: Final = {
    "avx512bf16": 3.5e11,
    "avx512vnni": 2.5e11,
    "avxvnni": 1.2e11,
    "avx2": 8e10,
    "neon": 6e10,
    "neoni8mm": 1e11,
}
_PLAIN_RATE: Final = 4e10
_GPU_RATE: Final = 5e12
_WEIGHTS_A_BYTE: Final = 1.6  # of a file in 4 to 5 bits
_MAX_BYTES: Final = 1 << 20


def known_throughput(model: Model) -> Throughput:
    """The throughput measured by an earlier run, else an estimate; nothing is measured here.

    Kept by files, devices and number of threads.
    """
    return _stored(model) or estimated_throughput(model)


def estimated_throughput(model: Model) -> Throughput:
    """Estimate from the processor's instruction set, its cores and the sizes of the files."""
    vision = model.vision
    cores = model.threads or default_threads()
    level = kernels()
    rate = cores * _RATES.get(level.name if level else "", _PLAIN_RATE)
    if not vision.device.is_cpu:
        rate = _GPU_RATE
    encode = work(vision.config, _PATCHES) / rate
    return Throughput(
        _PATCHES, encode, 2 * _WEIGHTS_A_BYTE * model.path.stat().st_size / rate, measured=False
    )


def refined(throughput: Throughput, config: Config, patches: int, seconds: float) -> Throughput:
    """The throughput after a picture of so many patches took so many seconds to encode.

    A measurement replaces an estimate, and a slower one; a slower measurement counts half, so that a busy
    moment of the machine does not last.
    """
    if patches < _FEWEST_PATCHES:  # mostly overhead
        return throughput
    found = seconds * work(config, throughput.patches) / work(config, patches)
    if throughput.measured and found > throughput.encode_seconds:
        found = (found + throughput.encode_seconds) / 2
    tokens = throughput.token_seconds
    if not throughput.measured:
        tokens *= found / throughput.encode_seconds
    return Throughput(throughput.patches, found, tokens)


def keep_throughput(model: Model, throughput: Throughput) -> None:
    """Write it down for `known_throughput`, in place of what was kept."""
    path = _path()
    with suppress(OSError):  # without a place to keep it, it is estimated again next time
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = {name: value for name, value in asdict(throughput).items() if name != "measured"}
        write_whole(path, json.dumps({**_read(path), _key(model): kept}, indent=1))


def _stored(model: Model) -> Throughput | None:
    kept = _read(_path()).get(_key(model))
    if not isinstance(kept, dict):
        return None
    with suppress(TypeError, ValueError):
        found = Throughput(**kept)
        if found.patches > 0 and found.encode_seconds > 0 <= found.token_seconds:
            return found
    return None


def _path() -> Path:
    return default_directory().parent / "throughput.json"


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
