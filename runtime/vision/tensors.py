"""An mmproj's tensors: checked against the tower's dimensions, and loaded as its graph wants them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from qvl.runtime.errors import GGUFError
from qvl.runtime.families.qwen2_vl.tower import GELU_SCALE, PROJECTOR, VisionConfig
from qvl.runtime.ggml import library as ggml
from qvl.runtime.ggml.devices import Device
from qvl.runtime.ggml.gguf import GGUFFile, TensorInfo
from qvl.runtime.ggml.weights import Array, Weights

_LIMITS: Final = {"n_layer": 512, "n_embd": 1 << 16, "n_head": 1024, "n_out": 1 << 16, "patch_size": 256}
_FLOATS: Final = (ggml.Type.F32, ggml.Type.F16, ggml.Type.BF16)
_INTEGERS: Final = (ggml.Type.I8, ggml.Type.I16, ggml.Type.I32, ggml.Type.I64, ggml.Type.F64)
_PATCH: Final = ("v.patch_embd.weight", "v.patch_embd.weight.1")
_QKV: Final = ("q", "k", "v")
_HINT: Final = "the file is damaged, or not an mmproj of Qwen2-VL"

Tensors = dict[str, TensorInfo]


def read_config(file: GGUFFile) -> VisionConfig:
    """The tower's dimensions, from the metadata and, where old files lie, from the shapes.

    Raises:
        GGUFError: another architecture or projector, a missing key, an impossible value.
    """
    kind = file.metadata.get("clip.projector_type", file.metadata.get("clip.vision.projector_type"))
    if file.architecture != "clip" or kind != PROJECTOR:
        raise GGUFError(
            f"{file.path}: architecture {file.architecture or 'none'!r} with projector {kind!r}, "
            f"expected 'clip' with {PROJECTOR!r}",
            hint="give the mmproj file of a Qwen2-VL model (--mmproj)",
        )
    n_embd = _number(file, "embedding_length")
    config = VisionConfig(
        n_layer=_number(file, "block_count"),
        n_embd=n_embd,
        # feed_forward_length is the decoder's width in files of llama.cpp's converter
        n_ff=_info(file, "v.blk.0.ffn_up.weight").n_elements // max(n_embd, 1),
        n_head=_number(file, "attention.head_count"),
        n_out=_info(file, "mm.2.weight").shape[0],
        patch_size=_number(file, "patch_size"),
        merge_size=_number(file, "spatial_merge_size", 2),
        eps=float(file.metadata.get("clip.vision.attention.layer_norm_epsilon", 1e-6)),
    )
    for name, limit in _LIMITS.items():
        if not 0 < getattr(config, name) <= limit:
            raise GGUFError(
                f"{file.path}: {name} is {getattr(config, name)}, expected 1 to {limit}", hint=_HINT
            )
    if config.n_embd % config.n_head or config.head_dim % 4:
        width = config.n_embd / config.n_head
        raise GGUFError(f"{file.path}: heads are {width:g} wide, expected a multiple of 4", hint=_HINT)
    if config.merge_size != 2:
        raise GGUFError(f"{file.path}: spatial_merge_size is {config.merge_size}, expected 2", hint=_HINT)
    return config


def load(file: GGUFFile, config: VisionConfig, device: Device) -> Weights:
    """The tower's weights on a device: matrices as stored, vectors and patch embedding in float32.

    Where a block's q, k and v lie one after the other in one type they become a single `attn_qkv`,
    one product in place of three.

    Raises:
        GGUFError: tensors are missing or have another shape or type; the message names them.
        BackendError: the device has too little memory.
    """
    found = _checked(file, config, _modern(dict(file.tensors), config))
    joined = [_join_qkv(found, f"v.blk.{i}.attn_") for i in range(config.n_layer)]
    kernels = [_float32(file, found.pop(name)) * GELU_SCALE for name in _PATCH]
    computed = {_PATCH[0]: Array(_patch_matrix(*kernels))}
    for name in [n for n, t in found.items() if len(t.shape) == 1]:
        factor = GELU_SCALE if name.startswith("v.blk.") else 1.0
        computed[name] = Array(_float32(file, found.pop(name)) * np.float32(factor))
    for prefix in itertools.chain.from_iterable(joined):
        parts = [computed.pop(f"{prefix}{x}.bias").data for x in _QKV]
        computed[f"{prefix}qkv.bias"] = Array(np.concatenate(parts))
    return Weights(file, found, computed, device)


def _modern(tensors: Tensors, config: VisionConfig) -> Tensors:
    """Old and other layouts made to look like the one that is written today."""
    for i in range(config.n_layer):
        up, down = f"v.blk.{i}.ffn_up", f"v.blk.{i}.ffn_down"
        if down + ".bias" in tensors and tensors[down + ".bias"].shape == (config.n_ff,) != (config.n_embd,):
            for part in (".weight", ".bias"):
                tensors[up + part], tensors[down + part] = tensors[down + part], tensors[up + part]
        for part in (".weight", ".bias"):
            whole = tensors.pop(f"v.blk.{i}.attn_qkv{part}", None)
            if whole is not None:
                tensors.update(_thirds(whole, f"v.blk.{i}.attn_", part))
    return tensors


def _thirds(whole: TensorInfo, prefix: str, part: str) -> Iterable[tuple[str, TensorInfo]]:
    rows, size = whole.shape[0] // 3, whole.nbytes // 3
    for i, x in enumerate(_QKV):
        name = f"{prefix}{x}{part}"
        yield name, TensorInfo(name, (rows, *whole.shape[1:]), whole.type, whole.offset + i * size, size)


def _checked(file: GGUFFile, config: VisionConfig, found: Tensors) -> Tensors:
    expected = dict(config.shapes())
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise GGUFError(
            f"{file.path}: {len(missing)} tensors are missing: {', '.join(missing[:6])}", hint=_HINT
        )
    for name, shape in expected.items():
        info = found[name]
        if info.shape != shape:
            raise GGUFError(
                f"{file.path}: tensor {name} has shape {list(info.shape)}, expected {list(shape)}", hint=_HINT
            )
        plain = name in _PATCH or len(shape) == 1
        if info.type in _INTEGERS or (plain and info.type not in _FLOATS):
            raise GGUFError(
                f"{file.path}: tensor {name} has type {info.type.name}, expected a float type", hint=_HINT
            )
    return {name: found[name] for name in expected}


def _join_qkv(tensors: Tensors, prefix: str) -> list[str]:
    """Replace a block's three weights by one, if they lie so; the prefix comes back if they do."""
    three = [tensors[f"{prefix}{x}.weight"] for x in _QKV]
    apart = any(a.offset + a.nbytes != b.offset for a, b in itertools.pairwise(three))
    if apart or len({t.type for t in three}) > 1:
        return []
    for x in _QKV:
        del tensors[f"{prefix}{x}.weight"]
    rows, columns = three[0].shape
    name = f"{prefix}qkv.weight"
    size = sum(t.nbytes for t in three)
    tensors[name] = TensorInfo(name, (3 * rows, columns), three[0].type, three[0].offset, size)
    return [prefix]


def _patch_matrix(first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.float32]:
    """The two frames' kernels [n_embd, 3, p, p] as one matrix for rows of `pixel_values`.

    The convolution's stride equals its kernel, so it is a matrix product over rows laid out
    (channel, frame, y, x).
    """
    both = np.stack([first, second], axis=2)
    return both.reshape(both.shape[0], -1)


def _float32(file: GGUFFile, info: TensorInfo) -> NDArray[np.float32]:
    raw = np.fromfile(file.path, np.uint8, info.nbytes, offset=info.offset)
    if info.type is ggml.Type.BF16:
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(info.shape)
    return (
        raw.view(np.float16 if info.type is ggml.Type.F16 else np.float32)
        .astype(np.float32)
        .reshape(info.shape)
    )


def _info(file: GGUFFile, name: str) -> TensorInfo:
    info = file.tensors.get(name)
    if info is None:
        raise GGUFError(f"{file.path}: tensor {name} is missing", hint=_HINT)
    return info


def _number(file: GGUFFile, key: str, default: int | None = None) -> int:
    value = file.metadata.get(f"clip.vision.{key}", default)
    if not isinstance(value, int):
        raise GGUFError(f"{file.path}: clip.vision.{key} is {value!r}, expected a number", hint=_HINT)
    return value
