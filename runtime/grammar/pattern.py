"""A schema's `pattern`, with its minLength and maxLength, as GBNF for the inside of a JSON string.

A pattern without anchors fits any text that holds a match (JSON Schema draft 2020-12, validation, 6.3.3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from qvl.runtime.errors import InputError
from qvl.runtime.grammar.characters import ANY, in_json
from qvl.runtime.grammar.regex import (
    Anchor,
    Characters,
    Choice,
    Node,
    Repeat,
    Sequence,
    length,
    parse,
    without_empty,
)

_ANYTHING: Final = Repeat(Characters(ANY), 0, None)
_MAX_WEIGHT: Final = 2000  # llama.cpp refuses to repeat more often, and writes a counted repeat out
_NAMED: Final = 24  # a longer expression of one character becomes a rule


def pattern_to_gbnf(pattern: str, least: int, most: int | None, rule: Callable[[str], str]) -> str:
    """GBNF for the texts that fit a pattern and have a length from least to most.

    Args:
        least, most: in characters; None is any number.
        rule: names an expression, and returns the name.

    Raises:
        InputError: a pattern that no grammar holds, or lengths that it cannot be joined with.
    """
    found = []
    for items in _anchored(parse(pattern)):
        if any(_holds_anchor(item) for item in items):
            raise InputError(
                f"the pattern {pattern!r:.80} has an anchor inside", hint="^ and $ may stand at its ends"
            )
        bounded = _bounded(pattern, items, least, most)
        if bounded is not None:
            found.append(Sequence(bounded))
    if not found:
        raise InputError(f"the pattern {pattern!r:.80} has no text of {least} to {most} characters")
    whole = found[0] if len(found) == 1 else Choice(tuple(found))
    if _weight(whole) > _MAX_WEIGHT:
        raise InputError(f"the pattern {pattern!r:.80} repeats more than {_MAX_WEIGHT} parts")
    return _emit(whole, rule)


def _anchored(node: Node) -> Iterator[tuple[Node, ...]]:
    """The alternatives of a pattern, with any text added on each side that has no anchor."""
    for start, items, end in _alternatives(node):
        yield (*(() if start else (_ANYTHING,)), *items, *(() if end else (_ANYTHING,)))


def _alternatives(node: Node) -> Iterator[tuple[bool, tuple[Node, ...], bool]]:
    """Each alternative without the anchors at its ends, and whether it had them."""
    for choice in node.choices if isinstance(node, Choice) else (node,):
        items = choice.items if isinstance(choice, Sequence) else (choice,)
        first, last = 0, len(items)
        while first < last and items[first] == Anchor("^"):
            first += 1
        while first < last and items[last - 1] == Anchor("$"):
            last -= 1
        start, end, items = first > 0, last < len(items), items[first:last]
        if len(items) == 1 and isinstance(items[0], Choice | Sequence):
            for inner_start, inner, inner_end in _alternatives(items[0]):
                yield start or inner_start, inner, end or inner_end
        else:
            yield start, items, end


def _holds_anchor(node: Node) -> bool:
    if isinstance(node, Repeat):
        return _holds_anchor(node.body)
    if isinstance(node, Sequence | Choice):
        return any(map(_holds_anchor, node.items if isinstance(node, Sequence) else node.choices))
    return isinstance(node, Anchor)


def _bounded(pattern: str, items: tuple[Node, ...], least: int, most: int | None) -> tuple[Node, ...] | None:
    """An alternative of these lengths; None if it has no such text.

    One repeat of a body of fixed length can be given other bounds; more would need their sum to be counted.
    """
    low, high = length(Sequence(items))
    if (high is not None and high < least) or (most is not None and low > most):
        return None
    if low >= least and (most is None or (high is not None and high <= most)):
        return items
    varying = [i for i, item in enumerate(items) if len(set(length(item))) > 1]
    i = varying[0]
    item = items[i]
    each = length(item.body) if isinstance(item, Repeat) else (0, 0)
    if len(varying) > 1 or not isinstance(item, Repeat) or each[0] != each[1]:
        raise InputError(
            f"the pattern {pattern!r:.80} beside minLength or maxLength, which no grammar holds",
            hint="say the length in the pattern, as in ^[a-z]{2,8}$",
        )
    fixed = sum(length(other)[0] for j, other in enumerate(items) if j != i)
    lowest = max(item.least, -(-(least - fixed) // each[0]))
    highest = item.most
    if most is not None:
        room = (most - fixed) // each[0]
        highest = room if highest is None else min(highest, room)
    if highest is not None and highest < lowest:
        return None
    return (*items[:i], Repeat(item.body, lowest, highest), *items[i + 1 :])


def _weight(node: Node) -> int:
    """Parts that llama.cpp writes out."""
    if isinstance(node, Repeat):
        return max(1, _weight(node.body)) * max(1, node.least, node.most or 0)
    if isinstance(node, Sequence | Choice):
        return sum(map(_weight, node.items if isinstance(node, Sequence) else node.choices))
    return 1


def _emit(node: Node, rule: Callable[[str], str]) -> str:
    if isinstance(node, Characters):
        text = in_json(node.ranges)
        return text if len(text) <= _NAMED else rule(text)
    if isinstance(node, Sequence):
        return " ".join(_emit(item, rule) for item in node.items) or '""'
    if isinstance(node, Choice):
        return "( " + " | ".join(_emit(choice, rule) for choice in node.choices) + " )"
    assert isinstance(node, Repeat)
    body: Node | None = node.body
    least = node.least
    if length(node.body)[0] == 0:  # llama.cpp refuses to repeat what may be empty
        body, least = without_empty(node.body), 0
    if body is None or node.most == 0:
        return '""'
    inner = _emit(body, rule)
    group = inner if isinstance(body, Characters | Choice) else f"( {inner} )"
    return group + _count(least, node.most)


def _count(least: int, most: int | None) -> str:
    named = {(0, None): "*", (1, None): "+", (0, 1): "?"}
    return named.get((least, most)) or f"{{{least},{'' if most is None else most}}}"
