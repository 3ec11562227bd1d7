"""Sets of characters as code point ranges, and their GBNF inside a JSON string."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, TypeAlias

Ranges: TypeAlias = tuple[tuple[int, int], ...]
"""Inclusive ranges of code points, in order and apart; no surrogates."""

ANY: Final[Ranges] = ((0, 0xD7FF), (0xE000, 0x10FFFF))
# ECMA-262, CharacterClassEscape: WhiteSpace and LineTerminator for \s
DIGIT: Final[Ranges] = ((0x30, 0x39),)
WORD: Final[Ranges] = ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
SPACE: Final[Ranges] = (
    (0x09, 0x0D), (0x20, 0x20), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029),
    (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF),
)  # fmt: skip
LINE_END: Final[Ranges] = ((0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029))

_ESCAPED: Final = {0x08: "b", 0x09: "t", 0x0A: "n", 0x0C: "f", 0x0D: "r", 0x22: '"', 0x5C: "\\"}
_PLAIN: Final[Ranges] = ((0x20, 0x21), (0x23, 0x5B), (0x5D, 0xD7FF), (0xE000, 0x10FFFF))


def union(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Ranges in any order as one set; surrogates are left out."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return intersection(merged, ANY)


def complement(ranges: Ranges) -> Ranges:
    """Every character that is not in the set."""
    gaps, begin = [], 0
    for low, high in ranges:
        if begin < low:
            gaps.append((begin, low - 1))
        begin = high + 1
    return intersection([*gaps, (begin, 0x10FFFF)], ANY)


def intersection(left: Iterable[tuple[int, int]], right: Ranges) -> Ranges:
    """Characters that are in both sets."""
    found = [(max(a, c), min(b, d)) for a, b in left for c, d in right]
    return tuple(sorted((low, high) for low, high in found if low <= high))


def in_json(ranges: Ranges) -> str:
    """GBNF for one character of a set, spelled as `json.dumps(ensure_ascii=False)` spells it.

    GBNF's negated classes are not used: llama.cpp lets them match bytes that are no UTF-8.
    """
    choices = []
    if plain := intersection(ranges, _PLAIN):
        choices.append("[" + "".join(_range(low, high) for low, high in plain) + "]")
    for code, letter in _ESCAPED.items():
        if _has(ranges, code):
            choices.append('"\\\\' + (f"\\{letter}" if letter in '"\\' else letter) + '"')
    for lead in (0x00, 0x10):
        control = range(lead, lead + 16)
        digits = "".join(f"{c % 16:x}" for c in control if c not in _ESCAPED and _has(ranges, c))
        if digits:
            choices.append(f'( "\\\\u00{lead >> 4}" [{digits}] )')
    return choices[0] if len(choices) == 1 else "( " + " | ".join(choices) + " )"


def _has(ranges: Ranges, code: int) -> bool:
    return any(low <= code <= high for low, high in ranges)


def _range(low: int, high: int) -> str:
    return _code(low) if low == high else f"{_code(low)}-{_code(high)}"


def _code(code: int) -> str:
    if chr(code).isascii() and chr(code).isalnum():
        return chr(code)
    return f"\\x{code:02X}" if code < 0x100 else f"\\u{code:04X}" if code < 0x10000 else f"\\U{code:08X}"
