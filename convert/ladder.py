"""The best types that fit into so much memory."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qvl.convert.pipeline import convert
from qvl.convert.summary import Converted
from qvl.convert.writer import readable
from qvl.runtime.errors import InputError

# Text and vision types from the best to the smallest: rows of benchmarks/quantization.md that no row without
# an importance matrix beats in both size and KL. The decoder loses most by far, so that the image encoder is
# the first to give up bits.
LADDER: Final = (
    ("bf16", "bf16"),
    ("q8_0", "q8_0"),
    ("q6_k", "q8_0"),
    ("q5_k_m", "q8_0"),
    ("q5_k_m", "q5_k"),
    ("q4_k_m", "q4_k"),
    ("iq4_xs", "iq4_xs"),
    ("q3_k_m", "q4_k"),
    ("q2_k", "q4_k"),
)
_UNITS: Final = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([kmg]i?)?b?", re.IGNORECASE)


@dataclass(frozen=True)
class Rung:
    """Types that were tried, and the bytes that a run with them takes."""

    text_type: str
    vision_type: str
    needed: int


@dataclass(frozen=True)
class Fit:
    """A choice, and why not the one above it.

    Attributes:
        better: the next better types, which do not fit; None if the best fit.
    """

    chosen: Rung
    better: Rung | None
    budget: int


def parse_size(text: str) -> int:
    """Bytes of "3GB", "2.5G", "800 MiB".

    Raises:
        InputError: not a size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or float(match[1]) == 0:
        raise InputError(f"{text!r} is not a size", hint="for example 3GB, 800MB or 2.5GiB")
    return int(float(match[1]) * _UNITS[(match[2] or "").lower()])


def choose(
    src: str | Path,
    out_dir: Path,
    budget: int,
    memory: Callable[[Converted], int],
    ladder: Sequence[tuple[str, str]] = LADDER,
    **options: Any,
) -> Fit:
    """Go down the ladder, on sketches of the files, to the first rung that fits.

    Args:
        out_dir: where the files will go; sketches go there for a moment.
        memory: bytes that a run of a pair of files takes.
        options: for `convert`.

    Raises:
        InputError: nothing on the ladder fits.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    better: Rung | None = None
    # One by one: memory does not fall with size, since ggml repacks some types for the CPU and not others.
    for text_type, vision_type in ladder:
        with tempfile.TemporaryDirectory(dir=out_dir, prefix=".qvl-fit-") as folder:
            made = convert(src, folder, text_type, vision_type, sketch=True, **options)
            rung = Rung(text_type, vision_type, memory(made))
        if rung.needed <= budget:
            return Fit(rung, better, budget)
        better = rung
    if better is None:
        raise InputError("no types to choose from")
    raise InputError(
        f"{src}: the smallest types, {better.text_type} and {better.vision_type}, need "
        f"{readable(better.needed)}, more than {readable(budget)}",
        hint="take a smaller context (`n_ctx`), smaller pictures (`max_pixels`) or a smaller model",
    )
