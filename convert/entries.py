"""Entries of a checkpoint's tensors: name, dtype, shape and place in a file of any format."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

# dtypes that weights may have, and numpy's for them: BF16 is kept as its bits.
READABLE: Final[dict[str, str]] = {"BF16": "<u2", "F16": "<u2", "F32": "<f4", "F64": "<f8"}
# Bytes of an element, of dtypes for buffers and quantized weights too.
ITEM_SIZE: Final[dict[str, int]] = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("BF16", "F16", "U16", "I16"), 2),
    **dict.fromkeys(("F32", "U32", "I32"), 4),
    **dict.fromkeys(("F64", "U64", "I64", "C64"), 8),
}
MAX_DIMS: Final = 8
HEAD: Final = "lm_head.weight"
# Tables that old versions saved: recomputed from the hyperparameters.
DERIVED: Final = re.compile(r"(^|\.)(inv_freq|position_ids|masked_bias)$")


@dataclass(frozen=True)
class TensorEntry:
    """Place of one tensor in a file.

    Attributes:
        dtype: a key of ITEM_SIZE.
        shape: rows first.
        path: the shard.
        offset: bytes from the start of the shard.
        nbytes: of its elements.
        strides: in bytes, or None where elements lie one after the other.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int
    strides: tuple[int, ...] | None = None
