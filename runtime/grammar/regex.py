"""Parses the regular expressions of JSON schemas: a subset of ECMA-262, read with its `u` flag.

Characters, classes, groups, alternation, greedy and lazy repeats, anchors at the ends. Everything else
(backreferences, look-around, word boundaries, property escapes, flags) is refused by name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, NoReturn, TypeAlias

from qvl.runtime.errors import InputError
from qvl.runtime.grammar.characters import DIGIT, LINE_END, SPACE, WORD, Ranges, complement, union


@dataclass(frozen=True)
class Characters:
    """One character of a set."""

    ranges: Ranges


@dataclass(frozen=True)
class Sequence:
    """One expression after another."""

    items: tuple[Node, ...]


@dataclass(frozen=True)
class Choice:
    """One of several expressions."""

    choices: tuple[Node, ...]


@dataclass(frozen=True)
class Repeat:
    """An expression several times.

    Attributes:
        most: None is any number.
    """

    body: Node
    least: int
    most: int | None


@dataclass(frozen=True)
class Anchor:
    """The beginning (^) or the end ($) of the text."""

    at: str


Node: TypeAlias = Characters | Sequence | Choice | Repeat | Anchor

_CLASSES: Final[dict[str, Ranges]] = {
    "d": DIGIT, "D": complement(DIGIT), "w": WORD, "W": complement(WORD), "s": SPACE, "S": complement(SPACE),
}  # fmt: skip
_CONTROLS: Final = {"t": 0x09, "n": 0x0A, "v": 0x0B, "f": 0x0C, "r": 0x0D}
_GROUPS: Final = {
    "(?=": "look-ahead", "(?!": "negative look-ahead", "(?<=": "look-behind", "(?<!": "negative look-behind",
}  # fmt: skip
_OPEN: Final = re.compile(r"\((?:\?:|\?<[A-Za-z_$][\w$]*>)?(?!\?)")
_REPEAT: Final = re.compile(r"(?:([*+?])|\{(\d{1,6})(,(\d{1,6})?)?\})\??")
_CODE: Final = re.compile(r"x([\da-fA-F]{2})|u\{([\da-fA-F]{1,6})\}|u([\da-fA-F]{4})|c([A-Za-z])|(0)(?!\d)")
_LOW_HALF: Final = re.compile(r"\\u([dD][c-fC-F][\da-fA-F]{2})")
_MAX_DEPTH: Final = 50


def parse(pattern: str) -> Node:
    """The expression that a pattern stands for.

    Raises:
        InputError: a feature that no grammar holds, or no regular expression.
    """
    parser = _Parser(pattern)
    node = parser.choice(0)
    if parser.at < len(pattern):
        parser.refuse("a ) that closes nothing")
    return node


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self.at = 0

    def refuse(self, what: str) -> NoReturn:
        raise InputError(
            f"the pattern {self._text!r:.80} has {what} at character {self.at + 1}",
            hint="a pattern may have characters, classes, groups, |, repeats, and ^ and $ at its ends",
        )

    def _next(self) -> str:
        return self._text[self.at : self.at + 1]

    def choice(self, depth: int) -> Node:
        if depth > _MAX_DEPTH:
            self.refuse(f"groups nested deeper than {_MAX_DEPTH}")
        choices = [self._sequence(depth)]
        while self._next() == "|":
            self.at += 1
            choices.append(self._sequence(depth))
        return choices[0] if len(choices) == 1 else Choice(tuple(choices))

    def _sequence(self, depth: int) -> Node:
        items: list[Node] = []
        while self._next() not in ("", "|", ")"):
            item = self._term(depth)
            if found := _REPEAT.match(self._text, self.at):
                if isinstance(item, Anchor):
                    self.refuse("a repeated anchor")
                self.at = found.end()
                item = Repeat(item, *self._count(found))
                if _REPEAT.match(self._text, self.at):
                    self.refuse("a repeat of a repeat")
            items.append(item)
        return items[0] if len(items) == 1 else Sequence(tuple(items))

    def _count(self, found: re.Match[str]) -> tuple[int, int | None]:
        if found[1]:
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[found[1]]
        least = int(found[2])
        most = least if found[3] is None else None if found[4] is None else int(found[4])
        if most is not None and most < least:
            self.refuse(f"a repeat of {least} to {most} times")
        return least, most

    def _term(self, depth: int) -> Node:
        c = self._next()
        if c in "^$":
            self.at += 1
            return Anchor(c)
        if c == "(":
            return self._group(depth)
        if c == "[":
            return Characters(self._class())
        if c == ".":
            self.at += 1
            return Characters(complement(LINE_END))
        if c == "\\":
            return Characters(self._escape(in_class=False))
        if c in "*+?{":
            self.refuse(f"a {c} that repeats nothing")
        return Characters(self._literal())

    def _literal(self) -> Ranges:
        code = ord(self._next())
        if 0xD800 <= code <= 0xDFFF:
            self.refuse("half of a surrogate pair")
        self.at += 1
        return ((code, code),)

    def _group(self, depth: int) -> Node:
        found = _OPEN.match(self._text, self.at)
        if found is None:
            kinds = (name for lead, name in _GROUPS.items() if self._text.startswith(lead, self.at))
            self.refuse(next(kinds, "a group of another kind than (…), (?:…) and (?<name>…)"))
        self.at = found.end()
        node = self.choice(depth + 1)
        if self._next() != ")":
            self.refuse("a ( that is not closed")
        self.at += 1
        return node

    def _class(self) -> Ranges:
        self.at += 1
        negated = self._next() == "^"
        self.at += negated
        found: list[tuple[int, int]] = []
        while self._next() != "]":
            if not self._next():
                self.refuse("a [ that is not closed")
            low = self._member()
            if self._next() == "-" and self._text[self.at + 1 : self.at + 2] not in ("]", ""):
                self.at += 1
                high = self._member()
                if not _is_one(low) or not _is_one(high) or high[0][0] < low[0][0]:
                    self.refuse("a range of characters that is none")
                found.append((low[0][0], high[0][0]))
            else:
                found += low
        self.at += 1
        ranges = union(found)
        ranges = complement(ranges) if negated else ranges
        if not ranges:
            self.refuse("a class without characters")
        return ranges

    def _member(self) -> Ranges:
        return self._escape(in_class=True) if self._next() == "\\" else self._literal()

    def _escape(self, *, in_class: bool) -> Ranges:
        self.at += 1
        c = self._next()
        if c in _CLASSES or c in _CONTROLS:
            self.at += 1
            return _CLASSES[c] if c in _CLASSES else ((_CONTROLS[c], _CONTROLS[c]),)
        if in_class and c == "b":
            self.at += 1
            return ((0x08, 0x08),)
        if found := _CODE.match(self._text, self.at):
            return self._code(found)
        self.at -= 1
        if c and c in "bB":
            self.refuse(f"a word boundary (\\{c})")
        if c and c in "pP":
            self.refuse(f"a property of Unicode (\\{c})")
        if c and c in "123456789k":
            self.refuse(f"a backreference (\\{c})")
        if not c or c.isalnum():
            self.refuse(f"\\{c}, which is no escape")
        self.at += 1
        return self._literal()

    def _code(self, found: re.Match[str]) -> Ranges:
        self.at = found.end()
        code = ord(found[4]) % 32 if found[4] else int(found[1] or found[2] or found[3] or found[5], 16)
        if 0xD800 <= code < 0xDC00 and found[3] and (low := _LOW_HALF.match(self._text, self.at)):
            self.at = low.end()
            code = 0x10000 + ((code - 0xD800) << 10) + (int(low[1], 16) - 0xDC00)
        if code > 0x10FFFF or 0xD800 <= code <= 0xDFFF:
            self.at = found.start() - 1
            self.refuse(f"U+{code:04X}, which is no character")
        return ((code, code),)


def _is_one(ranges: Ranges) -> bool:
    return len(ranges) == 1 and ranges[0][0] == ranges[0][1]


def length(node: Node) -> tuple[int, int | None]:
    """The least and the most characters of a text that fits; None is any number."""
    if isinstance(node, Characters):
        return 1, 1
    if isinstance(node, Anchor):
        return 0, 0
    if isinstance(node, Repeat):
        least, most = length(node.body)
        whole = 0 if most == 0 else None if most is None or node.most is None else most * node.most
        return least * node.least, whole
    parts = [length(part) for part in (node.items if isinstance(node, Sequence) else node.choices)]
    lows, highs = [low for low, _ in parts], [high for _, high in parts]
    bounded = [high for high in highs if high is not None]
    if isinstance(node, Sequence):
        return sum(lows), None if None in highs else sum(bounded)
    return min(lows), None if None in highs else max(bounded)


def without_empty(node: Node) -> Node | None:
    """An expression for the same texts but the empty one; None where that is all."""
    least, most = length(node)
    if most == 0:
        return None
    if least > 0:
        return node
    if isinstance(node, Repeat):
        body = without_empty(node.body)
        return (
            None if body is None else Repeat(body, max(1, node.least if body is node.body else 1), node.most)
        )
    if isinstance(node, Choice):
        found = [part for part in map(without_empty, node.choices) if part is not None]
        return found[0] if len(found) == 1 else Choice(tuple(found))
    assert isinstance(node, Sequence)
    first, rest = node.items[0], Sequence(node.items[1:])
    choices = [without_empty(rest)]
    if (begun := without_empty(first)) is not None:
        choices.append(Sequence((begun, *rest.items)))
    found = [part for part in choices if part is not None]
    return found[0] if len(found) == 1 else Choice(tuple(found))
