"""PyTorch's pickled weights (`pytorch_model*.bin`), read without PyTorch and without running what they say.

A pickle is a program. The one of a state dict needs five names: three that rebuild a tensor of a storage,
    the storage's type, and OrderedDict. These get stand-ins here; any other name is refused. The numbers
    stay in the file: an entry tells where they lie, in either format:

- zip (torch 1.6 and later): `NAME/data.pkl`, and each storage uncompressed as `NAME/data/KEY`
(torch/serialization.py,
  `_save`; caffe2/serialize/inline_container.h);
- legacy: five pickles (magic number, protocol, system, state dict, storage keys), then each storage, its
length first
  (torch/serialization.py, `_legacy_save`).
"""

from __future__ import annotations

import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Final

from qvl.convert.entries import ITEM_SIZE, MAX_DIMS, TensorEntry
from qvl.runtime.errors import CheckpointError

STORAGES: Final = {
    **{"FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "DoubleStorage": "F64"},
    **{"LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8"},
    **{"ByteStorage": "U8", "BoolStorage": "BOOL"},
}
MAX_PICKLE: Final = 64 << 20  # names and shapes of a hundred thousand tensors take less
MAGIC: Final = 0x1950A86A20F9469CFC6C
PROTOCOL: Final = 1001
_DAMAGED: Final = "the file is damaged or incomplete: download it again"


@dataclass(frozen=True)
class _StorageType:
    """Stands for a storage class."""

    dtype: str


@dataclass(frozen=True)
class _Storage:
    """A storage by name; `start` counts elements from where the named one begins."""

    key: str
    dtype: str
    size: int
    start: int = 0


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_pickle(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a pickled state dict: name to entry, in the dict's order.

    Raises:
        CheckpointError: a damaged file, a pickle that asks for anything but tensors, an archive of another
            kind.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            state, offsets = (_read_zip if zipfile.is_zipfile(file) else _read_legacy)(path, file)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # what an unpickler or zipfile raises for damaged bytes is not a closed list
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    if not isinstance(state, dict):
        raise _damaged(path, f"a dict of tensors was expected, found {type(state).__name__}")
    entries = {}
    for name, tensor in dict.items(state):
        if isinstance(name, str) and isinstance(tensor, _Tensor):
            entries[name] = _entry(path, name, tensor, offsets, size)
    if not entries:
        raise _damaged(path, "no tensors in its state dict")
    return entries


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: {what}", hint=_DAMAGED)


class _Unpickler(pickle.Unpickler):
    """Knows the names that a state dict needs, and no other."""

    def __init__(self, path: Path, file: Any) -> None:
        super().__init__(file, encoding="utf-8")
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        known: Mapping[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
            ("torch", "Size"): tuple,
        }
        if (module, name) in known:
            return known[module, name]
        if module in ("torch", "torch.cuda") and name in STORAGES:
            return _StorageType(STORAGES[name])
        raise CheckpointError(
            f"{self.path}: the pickle asks for {module}.{name}, which weights do not need",
            hint="do not load this file elsewhere: it may run code. Get the weights as safetensors",
        )

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise ValueError(f"{pid!r} names no storage")
        kind, key, _, size = pid[1:5]
        if not isinstance(kind, _StorageType) or not isinstance(key, str) or not _is_count(size):
            raise ValueError(f"{pid!r} names no storage")
        if len(pid) == 6 and pid[5] is not None:  # legacy: a part of another storage
            _, start, length = pid[5]
            if not _is_count(start) or not _is_count(length):
                raise ValueError(f"{pid!r} names no storage")
            return _Storage(key, kind.dtype, start + length, start)
        return _Storage(key, kind.dtype, size)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 48


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    if not isinstance(storage, _Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise ValueError("a tensor without storage, shape or strides")
    if (
        len(shape) != len(strides)
        or len(shape) > MAX_DIMS
        or not all(map(_is_count, (offset, *shape, *strides)))
    ):
        raise ValueError(f"a tensor of shape {shape!r} with strides {strides!r} at {offset!r}")
    return _Tensor(storage, offset, shape, strides)


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


def _read_zip(path: Path, file: BinaryIO) -> tuple[Any, dict[str, int]]:
    """The state dict, and where each storage's bytes begin."""
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        pickles = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            kind = "a TorchScript archive" if any("/code/" in name for name in names) else "a zip archive"
            raise CheckpointError(
                f"{path}: {kind}, expected torch's weights with one data.pkl",
                hint="save the model's weights with save_pretrained",
            )
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder").strip() != b"little":
            raise CheckpointError(f"{path}: written on a big-endian machine, expected little-endian numbers")
        if archive.getinfo(pickles[0]).file_size > MAX_PICKLE:
            raise _damaged(path, f"a pickle of more than {MAX_PICKLE} bytes")
        offsets = {}
        for info in archive.infolist():
            if info.filename.startswith(f"{root}data/"):
                if info.compress_type != zipfile.ZIP_STORED:
                    raise _damaged(path, f"{info.filename} is compressed, expected plain bytes")
                offsets[info.filename.removeprefix(f"{root}data/")] = _data_offset(path, file, info)
        content = archive.read(pickles[0])
    return _Unpickler(path, BytesIO(content)).load(), offsets


def _data_offset(path: Path, file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Offset of a member's bytes: after its local header, whose extra field aligns them (APPNOTE 4.3.7)."""
    file.seek(info.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise _damaged(path, f"{info.filename} has no local header")
    name, extra = struct.unpack_from("<HH", header, 26)
    return int(info.header_offset + 30 + name + extra)


class _Limited:
    """The file for the legacy pickles, at most MAX_PICKLE bytes of it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.left = file, MAX_PICKLE

    def read(self, size: int = -1) -> bytes:
        return self._count(self.file.read(min(size, self.left) if size >= 0 else self.left))

    def readline(self) -> bytes:
        return self._count(self.file.readline(self.left))

    def _count(self, data: bytes) -> bytes:
        self.left -= len(data)
        return data


def _read_legacy(path: Path, file: BinaryIO) -> tuple[Any, dict[str, int]]:
    file.seek(0)
    if file.read(1) != b"\x80":
        raise _damaged(path, "neither a zip archive nor a pickle, expected torch's weights")
    file.seek(0)
    limited = _Limited(file)
    parts = [_Unpickler(path, limited).load() for _ in range(5)]
    magic, protocol, system, state, keys = parts
    if magic != MAGIC or protocol != PROTOCOL:
        raise _damaged(path, f"magic number {magic!r} and protocol {protocol!r} are not torch's")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise CheckpointError(f"{path}: written on a big-endian machine, expected little-endian numbers")
    sizes = {storage.key: ITEM_SIZE[storage.dtype] for storage in _storages(state)}
    offsets, size = {}, file.seek(0, 1)
    end = file.seek(0, 2)
    at = size
    for key in keys:
        file.seek(at)
        (n,) = struct.unpack("<q", file.read(8))
        if key not in sizes or not 0 <= n <= (end - at - 8) // sizes[key]:
            raise _damaged(path, f"storage {key!r} with {n} elements does not fit the file")
        offsets[key] = at + 8
        at += 8 + n * sizes[key]
    return state, offsets


def _storages(state: Any) -> Iterator[_Storage]:
    if isinstance(state, dict):
        yield from (tensor.storage for tensor in dict.values(state) if isinstance(tensor, _Tensor))


def _entry(path: Path, name: str, tensor: _Tensor, offsets: Mapping[str, int], size: int) -> TensorEntry:
    """Entry of a tensor, checked to lie within its storage."""
    storage, item = tensor.storage, ITEM_SIZE[tensor.storage.dtype]
    n = math.prod(tensor.shape)
    last = (
        sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.strides, strict=True))
        if n
        else -1
    )
    begin = storage.start + tensor.offset
    if storage.key not in offsets or begin + last + 1 > storage.size:
        raise _damaged(path, f"tensor {name!r} lies outside of its storage {storage.key!r}")
    offset = offsets[storage.key] + begin * item
    if offset + (last + 1) * item > size:
        raise _damaged(path, f"tensor {name!r} lies outside of the file")
    plain = tuple(math.prod(tensor.shape[i + 1 :]) for i in range(len(tensor.shape)))
    strides = None if tensor.strides == plain else tuple(stride * item for stride in tensor.strides)
    return TensorEntry(name, storage.dtype, tensor.shape, path, offset, n * item, strides)
