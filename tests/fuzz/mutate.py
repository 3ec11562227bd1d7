"""Mutations of bytes, of JSON values, and of a GGUF header's fields, each decided by a Random."""

from __future__ import annotations

import copy
import json
import struct
from random import Random
from typing import Any, Final

INTEGERS: Final = (0, 1, 2, 3, 7, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF,
                   1 << 40, 1 << 63, (1 << 64) - 1)  # fmt: skip
VALUES: Final[tuple[Any, ...]] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, 1.5, 1e308, float("inf"), float("nan"), "", "x",
    "\0", "\udcff", "x" * 5000, "\x1b[2J", "../x", "/dev/zero", [], {}, [[]], [None], {"a": {}}, ["x"],
    {"": ""},
)  # fmt: skip


def mutate_bytes(data: bytes, rng: Random, focus: int | None = None) -> bytes:
    """Change, cut, move or repeat some bytes.

    Args:
        focus: nine of ten changes fall before this offset, as in a header.
    """
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        end = min(len(out), focus) if focus and rng.random() < 0.9 else len(out)
        at = rng.randrange(max(end, 1))
        size = rng.choice((1, 2, 4, 8, 16, 64))
        match rng.randrange(8):
            case 0 | 1:
                if at < len(out):
                    out[at] ^= 1 << rng.randrange(8)
            case 2:
                out[at : at + size] = rng.randbytes(size)
            case 3:
                del out[at : at + size]
            case 4:
                out[at:at] = rng.randbytes(size)
            case 5:
                form = rng.choice(("<I", "<Q", ">I", "<H"))
                width = struct.calcsize(form)
                value = rng.choice(INTEGERS) & ((1 << 8 * width) - 1)
                out[at : at + width] = struct.pack(form, value)
            case 6:
                del out[at:]
            case 7:
                other = rng.randrange(max(end, 1))
                out[at : at + size] = out[other : other + size]
    return bytes(out)


def mutate_json(value: Any, rng: Random) -> Any:
    """A copy of a JSON value with one to three nodes replaced, removed, repeated or nested."""
    root = [copy.deepcopy(value)]
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(root))
        holder, key = rng.choice(places)
        match rng.randrange(6):
            case 0 | 1 | 2:
                holder[key] = copy.deepcopy(rng.choice(VALUES))
            case 3:
                if holder is not root:
                    del holder[key]
            case 4:
                deep: Any = holder[key]
                for _ in range(rng.choice((2, 50, 1500))):
                    deep = [deep] if rng.random() < 0.5 else {"a": deep}
                holder[key] = deep
                break  # too deep to be copied
            case 5:
                other = rng.choice(places)
                if isinstance(holder, list) and holder is not root:
                    holder.append(copy.deepcopy(other[0][other[1]]) if other[0] is not root else None)
                elif other[0] is not root:
                    holder[key] = copy.deepcopy(other[0][other[1]])
    return root[0]


def dump(value: Any) -> bytes:
    """JSON of any depth, with NaN and stray surrogates as they are."""
    parts: list[str] = []
    todo: list[Any] = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, _Raw):
            parts.append(item.text)
        elif isinstance(item, list) and item:
            todo.append(_Raw("]"))
            for i, inner in enumerate(reversed(item)):
                todo += [inner, _Raw("" if i == len(item) - 1 else ",")]
            parts.append("[")
        elif isinstance(item, dict) and item:
            entries = list(item.items())
            todo.append(_Raw("}"))
            for i, (key, inner) in enumerate(reversed(entries)):
                comma = "" if i == len(entries) - 1 else ","
                todo += [inner, _Raw(f"{comma}{json.dumps(str(key))}:")]
            parts.append("{")
        else:
            parts.append(json.dumps(item))
    return "".join(parts).encode("utf-8", "surrogatepass")


class _Raw:
    def __init__(self, text: str) -> None:
        self.text = text


def _places(root: list[Any]) -> Any:
    todo: list[Any] = [root]
    while todo:
        holder = todo.pop()
        for key in holder if isinstance(holder, dict) else range(len(holder)):
            yield holder, key
            if isinstance(holder[key], list | dict):
                todo.append(holder[key])


# GGUF ----------------------------------------------------------------------------------------------------

_SIZES: Final = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # enum gguf_type
_STRING, _ARRAY = 8, 9


class Header:
    """A GGUF header taken apart: (key, type, raw value) and (name, shape, type, offset).

    Attributes:
        rest: the bytes after the header, its padding included.
    """

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 8
        n_tensors, n_pairs = self._unpack("<QQ")
        self.pairs = [self._pair() for _ in range(n_pairs)]
        self.tensors = [self._tensor() for _ in range(n_tensors)]
        self.end = self._at
        self.rest = data[self._at :]

    def _unpack(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return values

    def _bytes(self) -> bytes:
        (n,) = self._unpack("<Q")
        self._at += n
        return self._data[self._at - n : self._at]

    def _skip(self, kind: int) -> None:
        if kind == _STRING:
            self._bytes()
        elif kind == _ARRAY:
            inner, n = self._unpack("<IQ")
            if inner == _STRING:
                for _ in range(n):
                    self._bytes()
            else:
                self._at += n * _SIZES[inner]
        else:
            self._at += _SIZES[kind]

    def _pair(self) -> tuple[bytes, int, bytes]:
        key = self._bytes()
        (kind,) = self._unpack("<I")
        start = self._at
        self._skip(kind)
        return key, kind, self._data[start : self._at]

    def _tensor(self) -> tuple[bytes, tuple[int, ...], int, int]:
        name = self._bytes()
        (n_dims,) = self._unpack("<I")
        shape = self._unpack(f"<{n_dims}Q")
        kind, offset = self._unpack("<IQ")
        return name, shape, kind, offset

    def pack(self) -> bytes:
        out = [b"GGUF", struct.pack("<IQQ", 3, len(self.tensors), len(self.pairs))]
        for key, kind, raw in self.pairs:
            out += [struct.pack("<Q", len(key)), key, struct.pack("<I", kind), raw]
        for name, shape, kind, offset in self.tensors:
            out += [struct.pack("<Q", len(name)), name, struct.pack(f"<I{len(shape)}Q", len(shape), *shape)]
            out.append(struct.pack("<IQ", kind, offset))
        head = b"".join(out)
        return head + bytes(-len(head) % 32) + self.rest[-self.end % 32 :]


def mutate_gguf(data: bytes, rng: Random) -> bytes:
    """Change fields of the header so that what is around them still parses; a fifth of the time, bytes."""
    header = Header(data)
    if rng.random() < 0.2:
        return mutate_bytes(data, rng, header.end)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if rng.random() < 0.65 and header.pairs:
            i = rng.randrange(len(header.pairs))
            key, kind, _ = header.pairs[i]
            match rng.randrange(8):
                case 0:
                    del header.pairs[i]
                case 1:
                    header.pairs.append(header.pairs[i])
                case 2:
                    header.pairs[i] = (key, *_value(rng, rng.choice((*_SIZES, _STRING, _ARRAY))))
                case _:
                    header.pairs[i] = (key, *_value(rng, kind))
        elif header.tensors:
            i = rng.randrange(len(header.tensors))
            name, shape, kind, offset = header.tensors[i]
            match rng.randrange(6):
                case 0:
                    del header.tensors[i]
                case 1:
                    kind = rng.choice((*range(42), 999))
                case 2:
                    offset = rng.choice((0, 1, 32, offset + 32, 1 << 40, (1 << 64) - 32))
                case 3:
                    shape = tuple(rng.choice((0, 1, d, d + 1, d * 2, 1 << 31, 1 << 62)) for d in shape)
                case 4:
                    shape = shape[::-1] if rng.random() < 0.5 else (*shape, rng.choice((1, 2)))[:4]
                case 5:
                    name = rng.choice((b"", b"x" * 70, b"\xff", rng.choice(header.tensors)[0]))
            if i < len(header.tensors):
                header.tensors[i] = (name, shape, kind, offset)
    return header.pack()


def _value(rng: Random, kind: int) -> tuple[int, bytes]:
    if kind == _STRING:
        text = rng.choice(
            (b"", b"x", b"\xff\xfe", b"qwen2", b"llama", b"\0", b"x" * 9000, b"{{", b"clip", b"gpt2")
        )
        return kind, struct.pack("<Q", len(text)) + text
    if kind == _ARRAY:
        inner = rng.choice((0, 4, 5, 6, 7, 8, 9))
        n = rng.choice((0, 1, 2, 3, 4, 7))
        body = b"".join(_value(rng, inner if inner != _ARRAY else 4)[1] for _ in range(n))
        return kind, struct.pack("<IQ", inner, rng.choice((n, n, n, n, 1 << 30))) + body
    if kind == 6:
        number = rng.choice((0.0, -1.0, 1e-30, 1e30, float("inf"), float("nan"), 0.5, -0.0))
        return kind, struct.pack("<f", number)
    if kind == 12:
        return kind, struct.pack("<d", rng.choice((0.0, -1.0, float("nan"), 1e300)))
    width = _SIZES[kind]
    return kind, (rng.choice(INTEGERS) & ((1 << 8 * width) - 1)).to_bytes(width, "little")
