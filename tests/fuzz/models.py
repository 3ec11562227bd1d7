"""Model files of every family to mutate: GGUF pairs, checkpoints, pickled shards, importance matrices."""

from __future__ import annotations

import json
import shutil
import zlib
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
from support.families import NAMES, write_family

from fuzz.mutate import dump, mutate_bytes, mutate_json
from fuzz.mutate_gguf import mutate_gguf
from fuzz.mutate_pickle import as_legacy, mutate_archive
from qvl.convert import Converted, convert
from qvl.convert.checkpoint import Checkpoint
from qvl.runtime import load
from qvl.runtime.ggml.imatrix import Entry, Imatrix, read_imatrix, write_imatrix
from qvl.runtime.vision.encoder import VisionEncoder

PICTURE = np.arange(56 * 56 * 3, dtype=np.uint32).reshape(56, 56, 3).astype(np.uint8)


@cache
def checkpoint(work: Path, family: str) -> Path:
    """A tiny checkpoint of a family, made once in the folder of a child."""
    folder = work / "seeds" / family
    return folder if folder.exists() else write_family(folder, family, dtype="F16")


@cache
def pair(work: Path, family: str) -> Converted:
    """Its GGUF files."""
    return convert(checkpoint(work, family), work / "seeds" / f"{family}-gguf", "q8_0", "q8_0", force=True)


def emptied(folder: Path) -> Path:
    """A folder without what an earlier case left: model files find others beside them."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def make_text(work: Path, rng: Random) -> Path:
    family = rng.choice(NAMES)
    out = emptied(work / "text") / f"text-{family}.gguf"
    out.write_bytes(mutate_gguf(pair(work, family).text.read_bytes(), rng))
    return out


def use_text(path: Path) -> None:
    """Answer; in a third of cases about a picture, by the family's own image encoder."""
    family = path.stem.removeprefix("text-")
    with_picture = _chance(path, 3) == 0
    mmproj = pair(path.parents[1], family).mmproj if with_picture else None
    parts = [{"type": "image", "image": PICTURE}] if with_picture else []
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "Hi é"}]}]
    with load(path, mmproj, device="cpu", n_ctx=128, threads=1) as model:
        model.generate(messages, max_tokens=2).result()


def make_mmproj(work: Path, rng: Random) -> Path:
    family = rng.choice(NAMES)
    out = emptied(work / "mmproj") / f"mmproj-{family}.gguf"
    out.write_bytes(mutate_gguf(pair(work, family).mmproj.read_bytes(), rng))
    return out


def use_mmproj(path: Path) -> None:
    """Encode two pictures; with our kernels or ggml's, and at times before the family's own text model."""
    chance = _chance(path, 6)
    if chance == 0:
        text = pair(path.parents[1], path.stem.removeprefix("mmproj-")).text
        with load(text, path, device="cpu", n_ctx=128, threads=1) as model:
            messages = [{"role": "user", "content": [{"type": "image", "image": PICTURE}]}]
            model.generate(messages, max_tokens=1).result()
        return
    precision = "exact" if chance % 2 else "auto"
    encoder = VisionEncoder(path, device="cpu", threads=1, precision=precision, max_pixels=None)  # type: ignore[arg-type]
    try:
        encoder.encode([PICTURE, PICTURE[:28]])
    finally:
        encoder.close()


def _chance(path: Path, n: int) -> int:
    """A number below n by a file's content."""
    return zlib.crc32(path.read_bytes()) % n


def make_checkpoint(work: Path, rng: Random) -> Path:
    source, out = checkpoint(work, rng.choice(NAMES)), emptied(work / "case")
    for path in source.iterdir():
        (out / path.name).hardlink_to(path)
    target = rng.choice(sorted(p for p in out.iterdir()))
    data = target.read_bytes()
    target.unlink()
    if target.suffix == ".json" and rng.random() < 0.7:
        target.write_bytes(dump(mutate_json(json.loads(data), rng)))
    else:
        target.write_bytes(mutate_bytes(data, rng, 4000))
    return out


def use_checkpoint(path: Path) -> None:
    convert(path, path.parent / "out", "q8_0", "q8_0", force=True)


@cache
def shard(work: Path) -> bytes:
    """One of Qwen-VL's pickled shards."""
    folder = checkpoint(work, "qwen_vl")
    return min(folder.glob("*.bin"), key=lambda path: path.stat().st_size).read_bytes()


def make_pickle(work: Path, rng: Random) -> Path:
    out = work / "case" / "pytorch_model.bin"
    out.parent.mkdir(exist_ok=True)
    data = shard(work)
    match rng.randrange(10):
        case 0 | 1:
            out.write_bytes(mutate_bytes(data, rng, 2000))
        case 2 | 3 | 4:
            out.write_bytes(as_legacy(data, rng))
        case _:
            out.write_bytes(mutate_archive(data, rng))
    return out


def use_pickle(path: Path) -> None:
    with Checkpoint(path.parent) as found:
        for entry in found.tensors.values():
            assert entry.offset + entry.nbytes <= path.stat().st_size or entry.strides
            if entry.dtype in ("F16", "F32", "BF16"):
                found.array(entry).sum()


def make_imatrix(work: Path, rng: Random) -> Path:
    seed, out = work / "seed-imatrix.gguf", work / "case.gguf"
    if not seed.exists():
        entries = {
            f"blk.{i}.attn_q.weight": Entry(np.ones(256), 3, np.ones((1, 256, 256), np.float32))
            for i in range(2)
        }
        entries["blk.0.ffn_gate_exps.weight"] = Entry(np.ones((4, 256)), np.array([1, 2, 0, 3]))
        write_imatrix(seed, Imatrix(entries, ("a",), 3, 512, {"qvl.imatrix.plan": "x", "qvl.n": 3}))
    out.write_bytes(mutate_gguf(seed.read_bytes(), rng))
    return out


def use_imatrix(path: Path) -> None:
    found = read_imatrix(path)
    found.importance()
    for entry in found.entries.values():
        if entry.products is not None:
            float(entry.products.sum())
