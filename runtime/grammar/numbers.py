"""GBNF expressions for decimal numbers between bounds."""

from __future__ import annotations

import math
from typing import Final

_LARGEST: Final = 10**16 - 1
_FRACTION: Final = '( "." [0-9]{1,16} )?'
_ZEROS: Final = '( "." "0"{1,16} )?'


def integers_between(low: float, high: float, over: float, under: float) -> str:
    """Whole numbers of up to sixteen digits, low <= n <= high and over < n < under; "" if there are none."""
    least = max(-_LARGEST, _ceil(low), _floor(over) + 1)
    most = min(_LARGEST, _floor(high), _ceil(under) - 1)
    choices = []
    if least < 0 and least <= most:
        choices.append('"-" ( ' + _whole(max(1, -most), -least) + " )")
    if most >= 0 and least <= most:
        choices.append(_whole(max(0, least), most))
    return " | ".join(choices)


def numbers_between(low: float, high: float, over: float, under: float) -> str:
    """Decimal numbers between the bounds; "" when this finds none.

    Between two neighbouring whole numbers any fraction is allowed or none is, so of 0.5 to 2.5 the numbers
    from 1 to 2 are left.
    """
    choices = []
    positive, negative = ("", low, high, over, under), ('"-" ', -high, -low, -under, -over)
    for sign, least, most, above, below in (positive, negative):
        first = max(0, _ceil(max(least, above)))
        last = min(_LARGEST, _floor(min(most, below)))
        # whole parts that may have any fraction: n >= first and n + 1 <= last, or the fraction would go over
        begin = first + 1 if first == above else first
        if begin <= last - 1:
            choices.append(f"{sign}( {_whole(begin, last - 1)} ) {_FRACTION}")
        if first <= last and first == above and first <= last - 1:
            choices.append(f'{sign}"{first}" "." [0-9]{{0,15}} [1-9]')
        if first <= last and last != below and (last != first or first != above):
            choices.append(f'{sign}"{last}" {_ZEROS}')
    return " | ".join(dict.fromkeys(choices))


def _ceil(value: float) -> int:
    return math.ceil(max(-_LARGEST - 1, min(_LARGEST + 1, value)))


def _floor(value: float) -> int:
    return math.floor(max(-_LARGEST - 1, min(_LARGEST + 1, value)))


def _whole(low: int, high: int) -> str:
    """Numbers from low to high, 0 <= low <= high, without leading zeros."""
    choices = []
    while len(str(low)) < len(str(high)):
        end = 10 ** len(str(low)) - 1
        choices.append(_digits(str(low), str(end)))
        low = end + 1
    choices.append(_digits(str(low), str(high)))
    return " | ".join(choices)


def _digits(low: str, high: str) -> str:
    """Digit strings from low to high, which are equally long."""
    if not low:
        return ""
    if low == high:
        return f'"{low}"'
    n = len(low) - 1
    if low[1:] == "0" * n and high[1:] == "9" * n:
        return _digit(low[0], high[0]) + (f" [0-9]{{{n}}}" if n else "")
    if low[0] == high[0]:
        return f'"{low[0]}" ( {_digits(low[1:], high[1:])} )'
    choices = [f'"{low[0]}" ( {_digits(low[1:], "9" * n)} )']
    if int(high[0]) - int(low[0]) > 1:
        choices.append(_digit(str(int(low[0]) + 1), str(int(high[0]) - 1)) + f" [0-9]{{{n}}}")
    choices.append(f'"{high[0]}" ( {_digits("0" * n, high[1:])} )')
    return " | ".join(choices)


def _digit(low: str, high: str) -> str:
    return f'"{low}"' if low == high else f"[{low}-{high}]"
