"""A GGUF file taken apart: metadata, tensor directory and data, packed again with a layout of its own.

Nothing of qvl or of the gguf library: a header that they refuse must be written too.
"""

from __future__ import annotations

import copy
import math
import struct
from dataclasses import dataclass, replace
from typing import Any, Final

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

SIZES: Final = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # enum gguf_type
FORMS: Final = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q",
                12: "<d"}  # fmt: skip
STRING, ARRAY, FLOAT, DOUBLE = 8, 9, 6, 12
INTEGER_KINDS: Final = (0, 1, 2, 3, 4, 5, 10, 11)
BLOCKS: Final = {
    kind.value: sizes for kind, sizes in GGML_QUANT_SIZES.items() if isinstance(kind, GGMLQuantizationType)
}
MAX_BYTES: Final = 8 << 20  # of a tensor that a mutation enlarges


@dataclass
class Pair:
    """A key with its value as stored."""

    key: bytes
    kind: int
    raw: bytes

    @property
    def integer(self) -> int | None:
        """The value, where it is an integer."""
        if self.kind not in INTEGER_KINDS:
            return None
        return int(struct.unpack(FORMS[self.kind], self.raw)[0])

    def put(self, value: int) -> None:
        """Replace an integer, cut to its width."""
        width = SIZES[self.kind]
        self.raw = (value & ((1 << 8 * width) - 1)).to_bytes(width, "little")


@dataclass
class TensorPart:
    """An entry of the directory; `data` is what its offset pointed to."""

    name: bytes
    shape: tuple[int, ...]
    kind: int
    offset: int
    data: bytes = b""

    @property
    def nbytes(self) -> int:
        """Bytes by shape and type, or those that it has where the type is not known."""
        per_block, size = BLOCKS.get(self.kind, (0, 0))
        return math.prod(self.shape) // per_block * size if per_block else len(self.data)

    def refill(self) -> None:
        """Repeat or cut the data to what shape and type ask for."""
        wanted = self.nbytes
        if 0 <= wanted <= MAX_BYTES and self.data:
            self.data = (self.data * (wanted // len(self.data) + 1))[:wanted]


class GGUFParts:
    """Parses a sound file; `pack` writes whatever its parts have become.

    Attributes:
        end: where the header ends in the parsed file, in bytes.
    """

    def __init__(self, data: bytes) -> None:
        self._bytes, self._at = data, 8
        n_tensors, n_pairs = self._unpack("<QQ")
        self.pairs = [self._pair() for _ in range(n_pairs)]
        self.tensors = [self._tensor() for _ in range(n_tensors)]
        self.end = self._at
        start = self.end + -self.end % 32
        self.rest = data[start:]
        for part in self.tensors:
            part.data = self.rest[part.offset : part.offset + part.nbytes]

    def copy(self) -> GGUFParts:
        """Parts that can be changed without changing these."""
        made = copy.copy(self)
        made.pairs = [replace(pair) for pair in self.pairs]
        made.tensors = [replace(part) for part in self.tensors]
        return made

    def _unpack(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(form, self._bytes, self._at)
        self._at += struct.calcsize(form)
        return values

    def _text(self) -> bytes:
        (n,) = self._unpack("<Q")
        self._at += n
        return self._bytes[self._at - n : self._at]

    def _skip(self, kind: int) -> None:
        if kind == STRING:
            self._text()
        elif kind == ARRAY:
            inner, n = self._unpack("<IQ")
            if inner == STRING:
                for _ in range(n):
                    self._text()
            else:
                self._at += n * SIZES[inner]
        else:
            self._at += SIZES[kind]

    def _pair(self) -> Pair:
        key = self._text()
        (kind,) = self._unpack("<I")
        start = self._at
        self._skip(kind)
        return Pair(key, kind, self._bytes[start : self._at])

    def _tensor(self) -> TensorPart:
        name = self._text()
        (n_dims,) = self._unpack("<I")
        shape = self._unpack(f"<{n_dims}Q")
        kind, offset = self._unpack("<IQ")
        return TensorPart(name, shape, kind, offset)

    def lay_out(self) -> None:
        """Give every tensor the data that it asks for, one after the other."""
        parts, at = [], 0
        for part in self.tensors:
            part.refill()
            part.offset = at
            padded = part.data + bytes(-len(part.data) % 32)
            parts.append(padded)
            at += len(padded)
        self.rest = b"".join(parts)

    def pack(self) -> bytes:
        """The file's bytes: the header as it is now, and the data."""
        out = [b"GGUF", struct.pack("<IQQ", 3, len(self.tensors), len(self.pairs))]
        for pair in self.pairs:
            out += [text(pair.key), struct.pack("<I", pair.kind), pair.raw]
        for part in self.tensors:
            n = len(part.shape)
            out += [text(part.name), struct.pack(f"<I{n}Q", n, *part.shape)]
            out.append(struct.pack("<IQ", part.kind & 0xFFFFFFFF, part.offset & ((1 << 64) - 1)))
        head = b"".join(out)
        return head + bytes(-len(head) % 32) + self.rest


def text(value: bytes) -> bytes:
    """A string as GGUF stores it."""
    return struct.pack("<Q", len(value)) + value
