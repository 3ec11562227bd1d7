"""`qvl convert --fit`: the choice of types, and the words that explain it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvl.cli.output import Output, human_bytes

if TYPE_CHECKING:
    from qvl.convert.ladder import Fit
    from qvl.convert.summary import Converted
    from qvl.runtime.measure.memory import Memory


def fitting_types(
    src: str, out_dir: Path, size: str, out: Output, *, n_ctx: int, max_pixels: int | None, **options: Any
) -> tuple[str, str]:
    """Text and vision types for `convert`.

    Raises:
        InputError: not a size, or nothing fits.
    """
    from qvl.convert.ladder import choose, parse_size
    from qvl.runtime.find import ModelFiles
    from qvl.runtime.measure.memory import predict_memory

    predicted: dict[int, Memory] = {}

    def memory(made: Converted) -> int:
        found = predict_memory(ModelFiles(made.text, made.mmproj), n_ctx=n_ctx, max_pixels=max_pixels)
        predicted[found.total] = found
        return found.total

    chosen = choose(src, out_dir.expanduser(), parse_size(size), memory, **options)
    out.note(explain(chosen, predicted[chosen.chosen.needed], n_ctx))
    return chosen.chosen.text_type, chosen.chosen.vision_type


def explain(fit: Fit, memory: Memory, n_ctx: int) -> str:
    """Explain the choice of types."""
    lines = [
        f"{fit.chosen.text_type} and {fit.chosen.vision_type}: {human_bytes(memory.total)} of "
        f"{human_bytes(fit.budget)}",
        *(f"  {name:<34}{human_bytes(size):>10}" for name, size in memory_rows(memory, n_ctx)),
    ]
    if fit.better is not None:
        better = f"{fit.better.text_type} and {fit.better.vision_type}"
        lines.append(f"  the next better, {better}, would take {human_bytes(fit.better.needed)}")
    return "\n".join(lines)


def memory_rows(memory: Memory, n_ctx: int) -> list[tuple[str, int]]:
    """List the parts of a memory prediction, named for people."""
    text = memory.text
    rows = [
        ("decoder weights", text.weights),
        ("repacked for this CPU", text.repacked),
        (f"context of {n_ctx} tokens", text.kv_cache),
        ("decoder at work", text.compute + text.output),
        ("image encoder weights", memory.vision_weights),
    ]
    if memory.image_size is not None:
        width, height = memory.image_size
        rows.append((f"a picture of {width}×{height}", memory.vision_compute + memory.picture))
    rows.append(("Python and libraries", memory.process))
    return [(name, size) for name, size in rows if size]
