"""A GGUF file copied with changes, as a damaged or hostile one might have them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from numpy.typing import NDArray

Array = NDArray[Any]
KINDS = {
    bool: GGUFValueType.BOOL,
    int: GGUFValueType.UINT32,
    float: GGUFValueType.FLOAT32,
    str: GGUFValueType.STRING,
}


def edit(
    source: Path,
    target: Path,
    *,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Array | None] | None = None,
    rename: Callable[[str], str] = str,
) -> Path:
    """Copy a GGUF file.

    Args:
        metadata: values to set; None removes the key. A (value, type, item type) triple says its types.
        tensors: arrays to set or add; None removes the tensor.
        rename: gives a tensor's new name.
    """
    changed, arrays = dict(metadata or {}), dict(tensors or {})
    reader = GGUFReader(source)
    architecture = changed.pop("general.architecture", reader.fields["general.architecture"].contents())
    writer = GGUFWriter(target, str(architecture))
    for name, value in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", *changed):
            continue
        sub_type = value.types[-1] if value.types[0] is GGUFValueType.ARRAY else None
        writer.add_key_value(name, value.contents(), value.types[0], sub_type)
    for name, value in changed.items():
        if value is not None:
            writer.add_key_value(name, *_typed(value))
    for tensor in reader.tensors:
        if tensor.name not in arrays:
            dtype = GGMLQuantizationType(tensor.tensor_type)
            writer.add_tensor(rename(tensor.name), np.array(tensor.data), raw_dtype=dtype)
    for name, array in arrays.items():
        if array is not None:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _typed(value: Any) -> tuple[Any, GGUFValueType, GGUFValueType | None]:
    if isinstance(value, tuple):
        return value[0], value[1], value[2]
    if isinstance(value, list):
        item = GGUFValueType.INT32 if value and isinstance(value[0], int) else KINDS[type(value[0])]
        return value, GGUFValueType.ARRAY, item
    return value, KINDS[type(value)], None
