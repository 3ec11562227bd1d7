"""What is fuzzed: for each kind a seed to mutate, and what qvl does with the result.

A target may end well, or with a QvlError whose message names the file. Anything else is a finding.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, Final

import numpy as np
from PIL import Image
from support.checkpoint import Style, write_checkpoint

from fuzz.mutate import dump, mutate_bytes, mutate_gguf, mutate_json
from qvl.cli.chat import sessions
from qvl.cli.options import SamplingOptions
from qvl.convert import convert
from qvl.models import embedded
from qvl.runtime import load
from qvl.runtime.caption.ledger import Ledger
from qvl.runtime.caption.record import Record
from qvl.runtime.ggml.imatrix import Entry, Imatrix, read_imatrix, write_imatrix
from qvl.runtime.grammar.schema import read_schema, schema_to_grammar
from qvl.runtime.llama.sampler import Sampler, Sampling
from qvl.runtime.vision.cache import EmbeddingCache
from qvl.runtime.vision.encoder import VisionEncoder
from qvl.runtime.vision.image import open_picture
from qvl.runtime.vision.preprocess import Preprocessor
from qvl.runtime.vision.video import VideoOptions, load_video

SAMPLES: Final = embedded.path().parent / "samples"
PREPROCESSOR: Final = Preprocessor(max_pixels=28 * 28 * 16)
PICTURE: Final = np.zeros((56, 56, 3), np.uint8)


@dataclass(frozen=True)
class Kind:
    """One kind of input.

    Attributes:
        make: writes case `rng` into a folder and returns what messages must name.
        use: hands it to qvl.
        named: whether messages must name the file.
    """

    make: Callable[[Path, Random], Path]
    use: Callable[[Path], object]
    named: bool = True


@cache
def shared(work: Path) -> Path:
    """A tiny checkpoint and its GGUF files, made once in the folder of a child."""
    folder = work / "seed"
    if not folder.exists():
        write_checkpoint(folder / "tiny", None, Style(chat_template="chatml"))
        convert(folder / "tiny", folder / "gguf", "q8_0", "q8_0")
    return folder


def gguf(name: str) -> Callable[[Path, Random], Path]:
    def make(work: Path, rng: Random) -> Path:
        data = (shared(work) / "gguf" / name).read_bytes()
        out = work / "case.gguf"
        out.write_bytes(mutate_gguf(data, rng))
        return out

    return make


def use_text(path: Path) -> None:
    with load(path, device="cpu", n_ctx=128, threads=1) as model:
        model.generate([{"role": "user", "content": "Hi é"}], max_tokens=2).result()


def use_mmproj(path: Path) -> None:
    encoder = VisionEncoder(path, device="cpu", threads=1, precision="exact", max_pixels=None)
    try:
        encoder.encode([PICTURE])
    finally:
        encoder.close()


def make_checkpoint(work: Path, rng: Random) -> Path:
    source, out = shared(work) / "tiny", work / "case"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(source, out)
    target = rng.choice(sorted(p for p in out.iterdir()))
    data = target.read_bytes()
    if target.suffix == ".json" and rng.random() < 0.7:
        target.write_bytes(dump(mutate_json(json.loads(data), rng)))
    else:
        target.write_bytes(mutate_bytes(data, rng, 4000))
    return out


def use_checkpoint(path: Path) -> None:
    convert(path, path.parent / "out", "q8_0", "q8_0", force=True)


def make_imatrix(work: Path, rng: Random) -> Path:
    seed, out = work / "seed-imatrix.gguf", work / "case.gguf"
    if not seed.exists():
        entries = {
            f"blk.{i}.attn_q.weight": Entry(np.ones(256), 3, np.ones((1, 256, 256), np.float32))
            for i in range(2)
        }
        write_imatrix(seed, Imatrix(entries, ("a",), 3, 512, {"qvl.imatrix.plan": "x", "qvl.n": 3}))
    out.write_bytes(mutate_gguf(seed.read_bytes(), rng))
    return out


def use_imatrix(path: Path) -> None:
    found = read_imatrix(path)
    found.importance()
    for entry in found.entries.values():
        if entry.products is not None:
            float(entry.products.sum())


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


SCHEMA: Final = {
    "$defs": {
        "box": {"type": "object", "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 999}}}
    },
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 20},
        "boxes": {"type": "array", "items": {"$ref": "#/$defs/box"}, "minItems": 1, "maxItems": 4},
        "kind": {"enum": ["a", 1, None, True]},
        "n": {"anyOf": [{"type": "number"}, {"const": "none"}]},
        "both": {"allOf": [{"type": "object"}, {"properties": {"a": {"type": "boolean"}}}]},
    },
    "required": ["name", "boxes"],
    "additionalProperties": False,
}


def json_file(name: str, value: Any) -> Callable[[Path, Random], Path]:
    def make(work: Path, rng: Random) -> Path:
        data = dump(mutate_json(value, rng))
        out = work / name
        out.write_bytes(mutate_bytes(data, rng) if rng.random() < 0.2 else data)
        return out

    return make


@cache
def opened() -> Any:
    """The embedded model, opened once in a child."""
    return load(device="cpu", n_ctx=512, threads=1)


def use_schema(path: Path) -> None:
    grammar = schema_to_grammar(read_schema(path))
    with Sampler(opened().text.vocab, Sampling(), grammar):
        pass


ONE: Final = str(SAMPLES / "one.png")
SESSION: Final = {
    "qvl_session": 1,
    "saved": "2026-01-01T00:00:00+00:00",
    "model": "m.gguf",
    "system": "Be brief.",
    "settings": {"temperature": 0.5, "max_tokens": 4, "seed": 3, "top_k": 5},
    "messages": [
        {"role": "user", "content": [{"type": "image", "image": ONE, "max_pixels": 50000},
                                     {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "A star."},
    ],
}  # fmt: skip


def use_session(path: Path) -> None:
    saved = sessions.load(str(path))
    model = opened()
    messages = [*saved.messages, {"role": "user", "content": "And?"}]
    known = {f.name for f in fields(SamplingOptions)} & saved.settings.keys()
    settings = {name: saved.settings[name] for name in known}
    model.generate(messages, **{**settings, "max_tokens": 1}).result()


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


def make_messages(work: Path, rng: Random) -> Path:
    out = work / "case.json"
    out.write_bytes(dump(mutate_json(SESSION["messages"], rng)))
    return out


def use_messages(path: Path) -> None:
    try:
        messages = json.loads(path.read_text(encoding="utf-8", errors="surrogatepass"))
    except (ValueError, RecursionError):
        return  # the caller's own parser
    opened().generate(messages, max_tokens=1).result()


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


KINDS: Final = {
    "text": Kind(gguf("tiny-Q8_0.gguf"), use_text),
    "mmproj": Kind(gguf("mmproj-tiny-Q8_0.gguf"), use_mmproj),
    "checkpoint": Kind(make_checkpoint, use_checkpoint),
    "imatrix": Kind(make_imatrix, use_imatrix),
    "image": Kind(make_image, use_image),
    "video": Kind(make_video, use_video),
    "schema": Kind(json_file("case.json", SCHEMA), use_schema),
    "session": Kind(json_file("case.json", SESSION), use_session, named=False),
    "records": Kind(make_records, use_records),
    "messages": Kind(make_messages, use_messages, named=False),
    "cache": Kind(make_entry, use_entry),
}
