"""A Hugging Face checkpoint's weights: safetensors or pickled shards, mapped into memory, never copied whole.

A safetensors file is eight bytes of header length (little endian), a JSON header that names every
tensor's dtype, shape and byte range, and the bytes. The header is not trusted: ranges must lie in the
file, must not overlap, must cover it, and must be as long as dtype and shape say
(format: github.com/huggingface/safetensors, README, "Format").
"""

from __future__ import annotations

import json
import math
import mmap
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from qvl.convert.entries import DERIVED, HEAD, ITEM_SIZE, MAX_DIMS, READABLE, TensorEntry
from qvl.convert.pickle import read_pickle
from qvl.runtime.errors import CheckpointError

# Names of whole weights, as transformers looks for them; the index of shards is the name with ".index.json".
NAMES: Final = ("model.safetensors", "pytorch_model.bin")
MAX_HEADER: Final = 100_000_000  # the reference implementation's own limit
_DAMAGED: Final = "the file is damaged or incomplete: download it again"


class Checkpoint:
    """The tensors of a folder of safetensors files; a context manager that closes the maps.

    Args:
        folder: holds `model.safetensors`, or `model.safetensors.index.json` and its shards.

    Raises:
        CheckpointError: no weights, a shard missing, a damaged header.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.tensors: Mapping[str, TensorEntry] = _load_entries(self.folder)
        self._maps: dict[Path, mmap.mmap] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.tensors.values())

    def map(self, path: Path) -> mmap.mmap:
        """The shard's read-only map. Slices of `memoryview(map)` are views: drop them before `close`."""
        if path not in self._maps:
            try:
                with path.open("rb") as file:
                    self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{path}: cannot be mapped: {error}", hint=_DAMAGED) from error
        return self._maps[path]

    def array(self, entry: TensorEntry) -> npt.NDArray[Any]:
        """A tensor as a view of the map, nothing is read: F32, F64, or 16-bit patterns of F16 and BF16."""
        return np.ndarray(
            entry.shape, READABLE[entry.dtype], self.map(entry.path), entry.offset, entry.strides
        )

    def same(self, a: TensorEntry, b: TensorEntry) -> bool:
        """True if two tensors of one shape hold the same values, bit for bit if they have one dtype."""
        if a.dtype not in READABLE or b.dtype not in READABLE:
            return False
        left, right = self.array(a), self.array(b)
        plain = a.dtype == b.dtype
        for x, y in zip(left, right, strict=True):  # row by row: little memory
            if plain:
                equal = x.tobytes() == y.tobytes()
            else:
                equal = np.array_equal(to_float32(x, a.dtype), to_float32(y, b.dtype), equal_nan=True)
            if not equal:
                return False
        return True

    def release(self) -> None:
        """Drop all mapped pages from this process, so that resident memory stays small.

        They stay in the system's cache; touching one again, even at this moment in another thread, maps
        it again.
        """
        for shard in self._maps.values():
            if hasattr(shard, "madvise"):  # Windows has no madvise
                shard.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        for shard in self._maps.values():
            # After an error its traceback still holds views; the map then closes when they go.
            with suppress(BufferError):
                shard.close()
        self._maps.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def to_float32(values: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    """float32 of what `Checkpoint.array` gives, in a new array unless it is that already."""
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    if dtype == "F16":
        return np.ascontiguousarray(values).view(np.float16).astype(np.float32)
    return values.astype(np.float32, copy=False)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file whose top level is an object.

    Raises:
        CheckpointError: unreadable, not JSON, not an object, or with a key twice.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    return parse_json(raw, path)


_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(raw: bytes, path: Path) -> dict[str, Any]:
    """As `read_json`, from bytes; path is for the message."""
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
        if _SURROGATE.search(raw):  # half of a pair is no text, and fits in no GGUF file
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise CheckpointError(f"{path}: not valid JSON: {error}", hint=_DAMAGED) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path}: a JSON object was expected, found {type(value).__name__}", hint=_DAMAGED
        )
    return value


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The checked header of one safetensors file: name to entry, in file order.

    Raises:
        CheckpointError: anything that does not hold together; the message names the tensor.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(size - 8, MAX_HEADER):
                raise CheckpointError(
                    f"{path}: header of {length} bytes in a file of {size} bytes, "
                    f"at most {max(0, min(size - 8, MAX_HEADER))} expected",
                    hint=_DAMAGED,
                )
            header = parse_json(file.read(length), path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    header.pop("__metadata__", None)
    entries = [_entry(path, name, value, 8 + length) for name, value in header.items()]
    _check_ranges(path, entries, 8 + length, size)
    return {entry.name: entry for entry in entries}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} appears twice")
    return value


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _entry(path: Path, name: str, value: object, base: int) -> TensorEntry:
    def damaged(what: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {name!r}: {what}", hint=_DAMAGED)

    if not isinstance(value, dict):
        raise damaged(f"an object was expected, found {type(value).__name__}")
    dtype, shape, offsets = (value.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in ITEM_SIZE:
        raise damaged(f"unknown dtype {dtype!r}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(map(_is_count, shape)):
        raise damaged(f"shape {shape!r} is not a list of up to {MAX_DIMS} counts")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise damaged(f"data_offsets {offsets!r} is not a pair of counts")
    begin, end = offsets
    expected = math.prod(shape) * ITEM_SIZE[dtype]
    if end - begin != expected:
        raise damaged(f"{end - begin} bytes, but {dtype} {shape} takes {expected}")
    return TensorEntry(name, dtype, tuple(shape), path, base + begin, expected)


def _check_ranges(path: Path, entries: list[TensorEntry], base: int, size: int) -> None:
    """Byte ranges in order must touch one another and end where the file ends."""
    at = base
    for entry in sorted(entries, key=lambda e: (e.offset, e.nbytes)):
        if entry.offset != at:
            what = "overlaps another tensor" if entry.offset < at else "leaves a hole before it"
            raise CheckpointError(f"{path}: tensor {entry.name!r} {what}", hint=_DAMAGED)
        at += entry.nbytes
    if at != size:
        raise CheckpointError(f"{path}: {size} bytes, but its header describes {at}", hint=_DAMAGED)


def _load_entries(folder: Path) -> dict[str, TensorEntry]:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder", hint="pass a checkpoint's folder or a hub repo id")
    single = next((name for name in NAMES if (folder / name).exists()), None)
    index = next((name for name in NAMES if (folder / f"{name}.index.json").exists()), None)
    if single is not None and (index is None or NAMES.index(single) <= NAMES.index(index)):
        return _read(folder / single)
    if index is None:
        hint = "pass the folder that holds the model's weights"
        if (folder / "adapter_config.json").exists():
            hint = "this is an adapter: merge it into its base model and convert what that saves"
        elif others := sorted(p.name for p in folder.glob("*.safetensors")):
            hint = f"its index is missing: download {NAMES[0]}.index.json beside {others[0]}"
        elif any(folder.glob("*.gguf")):
            hint = "GGUF files are in this folder: they need no conversion"
        raise CheckpointError(f"{folder}: neither {' nor '.join(NAMES)}, whole or with an index", hint=hint)
    return _read_shards(folder, folder / f"{index}.index.json")


def _read(path: Path) -> dict[str, TensorEntry]:
    return read_pickle(path) if path.suffix == ".bin" else read_header(path)


def _read_shards(folder: Path, index: Path) -> dict[str, TensorEntry]:
    weights = _weight_map(index)
    files = sorted(set(weights.values()))
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(files)} shards are missing: {', '.join(missing)}",
            hint="download the missing files into the same folder",
        )
    entries: dict[str, TensorEntry] = {}
    for file in files:
        for name, entry in _read(folder / file).items():
            if name in entries:
                raise CheckpointError(
                    f"{folder / file}: tensor {name!r} is also in {entries[name].path.name}", hint=_DAMAGED
                )
            entries[name] = entry
    for name, file in weights.items():
        if name not in entries and (DERIVED.search(name) or name.endswith(HEAD)):
            continue  # transformers ties or recomputes these, whatever the index says
        if name not in entries or entries[name].path.name != file:
            raise CheckpointError(f"{index}: tensor {name!r} is not in {file}", hint=_DAMAGED)
    return entries


def _weight_map(path: Path) -> dict[str, str]:
    weights = read_json(path).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise CheckpointError(f"{path}: no weight_map", hint=_DAMAGED)
    suffix = ".bin" if path.name.startswith(NAMES[1]) else ".safetensors"
    for name, file in weights.items():
        # A name with a path in it could read a file outside of the checkpoint.
        if not isinstance(file, str) or not file.endswith(suffix) or Path(file).name != file:
            raise CheckpointError(f"{path}: {name!r} is in {file!r}, which is no shard's name", hint=_DAMAGED)
    return weights
