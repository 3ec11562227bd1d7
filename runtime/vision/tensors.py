"""Reads the tensors of vision GGUF files for the towers of all families."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qvl.runtime.errors import GGUFError
from qvl.runtime.ggml import library as ggml
from qvl.runtime.ggml.gguf import GGUFFile, TensorInfo
from qvl.runtime.ggml.weights import Array
from qvl.runtime.vision.header import HINT, value

_FLOATS: Final = (ggml.Type.F32, ggml.Type.F16, ggml.Type.BF16)
_INTEGERS: Final = (ggml.Type.I8, ggml.Type.I16, ggml.Type.I32, ggml.Type.I64, ggml.Type.F64)
_QKV: Final = ("q", "k", "v")

Tensors = dict[str, TensorInfo]
Shapes = Mapping[str, tuple[int, ...]]


def setting(file: GGUFFile, key: str, default: Any = None) -> Any:
    """The value of `clip.vision.KEY`; see `qvl.runtime.vision.header.value`."""
    return value(file.metadata, f"clip.vision.{key}", default, path=file.path)


def tensor(file: GGUFFile, name: str) -> TensorInfo:
    """A tensor of the file.

    Raises:
        GGUFError: there is none of this name.
    """
    info = file.tensors.get(name)
    if info is None:
        raise GGUFError(f"{file.path}: tensor {name} is missing", hint=HINT)
    return info


def check_heads(file: GGUFFile, n_embd: int, n_head: int, multiple: int = 4) -> None:
    """Refuse heads that do not divide the width, or whose own width is no multiple of `multiple`."""
    if n_embd % n_head or n_embd // n_head % multiple:
        raise GGUFError(
            f"{file.path}: heads are {n_embd / n_head:g} wide, expected a multiple of {multiple}", hint=HINT
        )


def check_merge(file: GGUFFile, merge_size: int) -> int:
    """Refuse all but the 2×2 merger of the published models."""
    if merge_size != 2:
        raise GGUFError(f"{file.path}: clip.vision.spatial_merge_size is {merge_size}, expected 2", hint=HINT)
    return merge_size


def checked(file: GGUFFile, found: Tensors, expected: Shapes, plain: Collection[str] = ()) -> Tensors:
    """The expected tensors of those found.

    Args:
        plain: matrices that must not be quantized; vectors never are.

    Raises:
        GGUFError: tensors are missing, or have another shape or type; the message names them.
    """
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise GGUFError(
            f"{file.path}: {len(missing)} tensors are missing: {', '.join(missing[:6])}", hint=HINT
        )
    for name, shape in expected.items():
        info = found[name]
        if info.shape != shape:
            raise GGUFError(
                f"{file.path}: tensor {name} has shape {list(info.shape)}, expected {list(shape)}", hint=HINT
            )
        unquantized = name in plain or len(shape) == 1
        if info.type in _INTEGERS or (unquantized and info.type not in _FLOATS):
            raise GGUFError(
                f"{file.path}: tensor {name} has type {info.type.name}, expected a float type", hint=HINT
            )
    return {name: found[name] for name in expected}


def split_qkv(tensors: Tensors, prefix: str) -> None:
    """Replace a block's fused `PREFIXqkv`, where there is one, by its three parts."""
    for part in (".weight", ".bias"):
        whole = tensors.pop(f"{prefix}qkv{part}", None)
        if whole is not None:
            tensors.update(_thirds(whole, prefix, part))


def _thirds(whole: TensorInfo, prefix: str, part: str) -> Iterable[tuple[str, TensorInfo]]:
    rows, size = whole.shape[0] // 3, whole.nbytes // 3
    for i, x in enumerate(_QKV):
        name = f"{prefix}{x}{part}"
        yield name, TensorInfo(name, (rows, *whole.shape[1:]), whole.type, whole.offset + i * size, size)


def vectors(file: GGUFFile, tensors: Tensors) -> dict[str, Array]:
    """Take the vectors out of the tensors and give them in float32."""
    names = [name for name, info in tensors.items() if len(info.shape) == 1]
    return {name: Array(float32(file, tensors.pop(name))) for name in names}


def join_qkv(tensors: Tensors, computed: dict[str, Array], prefix: str) -> None:
    """Replace a block's weights for q, k and v by one, `PREFIXqkv`, where they lie one after the other.

    Args:
        tensors: of the file.
        computed: holds their biases, which become one as well.
    """
    three = [tensors[f"{prefix}{x}.weight"] for x in _QKV]
    apart = any(a.offset + a.nbytes != b.offset for a, b in itertools.pairwise(three))
    if apart or len({t.type for t in three}) > 1:
        return
    for x in _QKV:
        del tensors[f"{prefix}{x}.weight"]
    rows, columns = three[0].shape
    name = f"{prefix}qkv.weight"
    size = sum(t.nbytes for t in three)
    tensors[name] = TensorInfo(name, (3 * rows, columns), three[0].type, three[0].offset, size)
    biases = [computed.pop(f"{prefix}{x}.bias").data for x in _QKV]
    computed[f"{prefix}qkv.bias"] = Array(np.concatenate(biases))


def patch_matrix(file: GGUFFile, *kernels: TensorInfo) -> NDArray[np.float32]:
    """The kernels [n_embd, 3, p, p] of a patch's frames as one matrix for rows of `pixel_values`.

    The convolution's stride equals its kernel, so it is a matrix product over rows laid out
    (channel, frame, y, x).
    """
    both = np.stack([float32(file, kernel) for kernel in kernels], axis=2)
    return both.reshape(both.shape[0], -1)


def float32(file: GGUFFile, info: TensorInfo) -> NDArray[np.float32]:
    """The values of a tensor of a float type."""
    raw = np.fromfile(file.path, np.uint8, info.nbytes, offset=info.offset)
    if info.type is ggml.Type.BF16:
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(info.shape)
    return (
        raw.view(np.float16 if info.type is ggml.Type.F16 else np.float32)
        .astype(np.float32)
        .reshape(info.shape)
    )
