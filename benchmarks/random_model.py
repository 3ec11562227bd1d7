"""Models of Qwen2-VL-2B's shape, made on the spot: random weights are as fast as any."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from qvl.convert import convert

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from support.checkpoint import Shape, Style, write_checkpoint

# Qwen/Qwen2-VL-2B, config.json; its vocabulary is cut to the one that the tests bring along
WHOLE = Shape(hidden=1536, inner=8960, heads=12, layers=28, dim=1280, vision_heads=16, depth=32)
SEEING = replace(WHOLE, inner=512, layers=1)
SMALL = Shape(dim=64, vision_heads=2, depth=2)
TEXT_TYPE = "q4_k_m"


def checkpoint(work: Path, shape: Shape) -> Path:
    """A random checkpoint in a folder, made unless it is there."""
    folder = work / f"random-{shape.layers}-{shape.depth}"
    if not (folder / "model.safetensors").exists():
        print(f"making {folder.name} ...", file=sys.stderr)
        write_checkpoint(folder, shape, Style(dtype="BF16", chat_template="chatml", std=0.02))
    return folder


def files(work: Path, shape: Shape, types: list[str]) -> tuple[Path, dict[str, Path]]:
    """A text GGUF and an mmproj of each type, made unless they are there."""
    source, text, made = checkpoint(work, shape), Path(), {}
    for kind in types:
        out = work / source.name / kind
        found = sorted(out.glob("*.gguf"))
        if len(found) != 2:
            print(f"converting it to {kind} ...", file=sys.stderr)
            convert(source, out, TEXT_TYPE, kind, force=True)
            found = sorted(out.glob("*.gguf"))
        made[kind] = next(path for path in found if path.name.startswith("mmproj"))
        text = next(path for path in found if not path.name.startswith("mmproj"))
    return text, made
