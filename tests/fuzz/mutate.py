"""Mutations of bytes and of JSON values, each decided by a Random."""

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
