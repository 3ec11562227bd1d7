"""Pictures, videos, captions' records and cache entries to mutate."""

from __future__ import annotations

import contextlib
import io
import json
from functools import cache
from pathlib import Path
from random import Random
from typing import Final

import numpy as np
from PIL import Image

from fuzz.mutate import dump, mutate_bytes, mutate_json
from fuzz.requests import SAMPLES
from qvl.runtime.caption.ledger import Ledger
from qvl.runtime.caption.record import Record
from qvl.runtime.vision.cache import EmbeddingCache
from qvl.runtime.vision.image import open_picture
from qvl.runtime.vision.preprocess import Preprocessor
from qvl.runtime.vision.video import VideoOptions, load_video

PREPROCESSOR: Final = Preprocessor(max_pixels=28 * 28 * 16)


@cache
def encoded() -> tuple[tuple[str, bytes], ...]:
    """Small pictures in every format that Pillow writes, and the samples."""
    base = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 52, 3), np.uint8))
    made = []
    for kind, mode in (
        ("PNG", "RGB"), ("PNG", "P"), ("PNG", "RGBA"), ("PNG", "I;16"), ("JPEG", "RGB"), ("JPEG", "CMYK"),
        ("GIF", "P"), ("WEBP", "RGBA"), ("BMP", "RGB"), ("TIFF", "RGB"), ("AVIF", "RGB"), ("PPM", "RGB"),
        ("ICO", "RGB"),
    ):  # fmt: skip
        buffer = io.BytesIO()
        with contextlib.suppress(OSError, KeyError, ValueError):
            picture = base.convert("L").convert("I;16") if mode == "I;16" else base.convert(mode)
            picture.save(buffer, kind)
            made.append((kind.lower(), buffer.getvalue()))
    return (*made, *((p.suffix[1:], p.read_bytes()) for p in sorted(SAMPLES.glob("*.jpg"))))


def make_image(work: Path, rng: Random) -> Path:
    suffix, data = rng.choice(encoded())
    out = work / f"case.{suffix}"
    out.write_bytes(mutate_bytes(data, rng, 200 if rng.random() < 0.5 else None))
    return out


def use_image(path: Path) -> None:
    PREPROCESSOR.image(open_picture(path))


@cache
def clips() -> tuple[tuple[str, bytes], ...]:
    frames = [Image.new("RGB", (48, 40), (40 * i, 0, 90)) for i in range(5)]
    made = []
    for kind in ("GIF", "WEBP", "PNG"):
        buffer = io.BytesIO()
        frames[0].save(buffer, kind, save_all=True, append_images=frames[1:], duration=200)
        made.append((kind.lower(), buffer.getvalue()))
    return (*made, *((p.suffix[1:], p.read_bytes()) for p in sorted(SAMPLES.glob("*.mp4"))))


def make_video(work: Path, rng: Random) -> Path:
    suffix, data = rng.choice(clips())
    out = work / f"case.{suffix}"
    out.write_bytes(mutate_bytes(data, rng, 600 if rng.random() < 0.5 else None))
    return out


def use_video(path: Path) -> None:
    load_video(path, PREPROCESSOR, VideoOptions(max_frames=8, min_pixels=784, max_pixels=784 * 16))


def make_records(work: Path, rng: Random) -> Path:
    records = [Record("a.png", "a cat", captions=("a", "b"), seconds=1.5, sha256="aa", prompt="p"),
               Record("b.png", error="b.png: cut short"),
               Record("c.png", 'a "dog",\nok', boxes=({"label": "x"},))]  # fmt: skip
    out = work / rng.choice(("case.jsonl", "case.csv"))
    for path in work.glob("*case.*"):
        path.unlink()
    with Ledger(out, {"prompt": "p", "temp": 0.5}) as ledger:
        ledger.append(records)
    beside = out.with_name(f"{out.name}.qvl")
    target = rng.choice((out, out, beside))
    lines = target.read_bytes().split(b"\n")
    if target.suffix != ".csv" and rng.random() < 0.6:
        i = rng.choice([i for i, line in enumerate(lines) if line])
        lines[i] = dump(mutate_json(json.loads(lines[i]), rng))
        target.write_bytes(b"\n".join(lines))
    else:
        target.write_bytes(mutate_bytes(b"\n".join(lines), rng))
    return out


def use_records(path: Path) -> None:
    for mode in ("skip", "overwrite"):
        with Ledger(path, {"prompt": "p", "temp": 0.5}, mode, accept_changes=True) as ledger:  # type: ignore[arg-type]
            found = [*ledger.records(), *ledger.recent(2)]
            for record in found:
                record.as_json()
                ledger.with_content(str(record.sha256), str(record.prompt))
            ledger.append([Record("a.png", "new")])
            ledger.finish()


KEY: Final = "ab" * 32


def make_entry(work: Path, rng: Random) -> Path:
    out = work / "cache" / f"{KEY}.safetensors"
    if not (seed := work / "seed-entry").exists():
        embedding = type("E", (), {"embeddings": np.ones((4, 8), np.float32), "grid_thw": (1, 4, 4)})()
        EmbeddingCache(work / "cache").put(KEY, embedding)
        seed.write_bytes(out.read_bytes())
    out.write_bytes(mutate_bytes(seed.read_bytes(), rng))
    return out


def use_entry(path: Path) -> None:
    found = EmbeddingCache(path.parent).get(KEY)
    assert found is None or (found.embeddings == 1).all(), "another's content under this key"
