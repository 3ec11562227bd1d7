"""`pattern` in schemas: the grammar's texts are those that ECMA-262 matches, by another implementation."""

from __future__ import annotations

import json
import re
from itertools import product
from typing import Any

import pytest
import regress
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from support.schemas import GrammarText, is_valid

from qvl.runtime.errors import InputError
from qvl.runtime.grammar.schema import schema_to_grammar
from qvl.runtime.llama.model import LlamaModel

PATTERNS = [
    r"^a*$", r"a", r"^a", r"b$", r"^$", r"", r"^(a|b)+$", r"^(?:ab)?c{1,2}$", r"^(a|b$)|^c", r"^(a*)*b$",
    r"^(a?|b*){2,3}$", r"^[^a]$", r"^[a-b]{2}$", r"^\w-\d?$", r"^[\w-]+$", r"^.$", r"^\s\S$", r"^(?<n>a)b$",
    r"^a+?b??$", r"^(^a|b$)$", r"^\x61\u0062\u{63}$", r"^[\d\-^]$", r"^\D$", r"^[]a]?$|c", r"^\cJ$", r"^[^]$",
    r"^a{0}b$", r"^(a|)(b|)$", r"a|^b|c$", r"^\W$", r"^((a|b)(c|))*$", r"^\0?a$", r"^[\b]$", r"^a{2,}$",
    r'^["\\]$',
]  # fmt: skip
ALPHABET = 'abc1-^]"\\\n \x00\x08\x1f\x7fé\u2028😀'


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_texts_are_those_that_match(model: LlamaModel, pattern: str) -> None:
    if "[]" in pattern:  # in ECMA-262 a class of nothing, which can never match
        with pytest.raises(InputError, match="without characters"):
            schema_to_grammar({"type": "string", "pattern": pattern})
        return
    regex = regress.Regex(pattern, "u")
    schema = {"type": "string", "pattern": pattern}
    some = [*ALPHABET, *map("".join, product('ab"c-', repeat=2)), *map("".join, product("abc", repeat=3)), ""]
    for text in some:
        with GrammarText(model.vocab, schema) as grammar:
            expected = regex.find(text) is not None
            assert grammar.accepts(json.dumps(text, ensure_ascii=False)) == expected, text


atoms = st.sampled_from(["a", "b", "c", ".", r"\d", r"\w", "[ab]", "[^a]", "é", r"\.", r"\s"])
repeats = st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{2,}", "*?", "{0,1}"])
patterns = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
        st.builds(lambda body, count: f"(?:{body}){count}", inner, repeats),
    ),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    patterns,
    st.booleans(),
    st.booleans(),
    st.lists(st.text("abc1 é.", max_size=6), max_size=8),
    st.integers(),
)
@example("(a*)*", True, True, ["", "aa", "b"], 0)
@example("(?:(?:a|b?)+){2,}", True, True, ["", "abab", "c"], 1)
def test_random_patterns(
    model: LlamaModel, pattern: str, start: bool, end: bool, texts: list[str], seed: int
) -> None:
    pattern = f"{'^' if start else ''}({pattern}){'$' if end else ''}"
    regex, schema = regress.Regex(pattern, "u"), {"type": "string", "pattern": pattern}
    for text in texts:
        with GrammarText(model.vocab, schema) as grammar:
            assert grammar.accepts(json.dumps(text, ensure_ascii=False)) == (regex.find(text) is not None)
    with GrammarText(model.vocab, schema) as grammar:
        written = grammar.walk(seed)
    assume(written is not None)
    assert is_valid(json.loads(written or ""), schema), written


@pytest.mark.parametrize(
    ("pattern", "bounds"),
    [
        ("^[a-b]*$", (2, 3)), ("^a[ab]+c?$", (3, 3)), ("^(ab)+$", (3, 5)), ("^a{2,4}$|^b$", (0, 2)),
        ("^ab$", (1, 2)), ("^a*$|^bb$", (2, None)),
    ],
)  # fmt: skip
def test_lengths_beside_a_pattern(model: LlamaModel, pattern: str, bounds: tuple[int, int | None]) -> None:
    schema: dict[str, Any] = {"type": "string", "pattern": pattern, "minLength": bounds[0]}
    schema |= {"maxLength": bounds[1]} if bounds[1] is not None else {}
    if pattern == "^a[ab]+c?$":  # two parts whose lengths vary
        with pytest.raises(InputError, match="beside minLength or maxLength"):
            schema_to_grammar(schema)
        return
    for n in range(6):
        for text in map("".join, product("abc", repeat=n)):
            with GrammarText(model.vocab, schema) as grammar:
                assert grammar.accepts(json.dumps(text)) == is_valid(text, schema), text


@pytest.mark.parametrize(
    ("pattern", "complaint"),
    [
        (r"(a)\1", r"a backreference (\1) at character 4"),
        (r"a(?=b)", "look-ahead at character 2"),
        (r"a(?!b)", "negative look-ahead"),
        (r"(?<=a)b", "look-behind"),
        (r"(?i)a", "a group of another kind"),
        (r"\bword\b", r"a word boundary (\b)"),
        (r"\p{L}+", r"a property of Unicode (\p)"),
        (r"\q", r"\q, which is no escape"),
        ("a^b", "an anchor inside"),
        ("(^a)b", "an anchor inside"),
        ("^*", "a repeated anchor"),
        ("*a", "a * that repeats nothing"),
        ("a**", "a repeat of a repeat"),
        ("a{3,2}", "a repeat of 3 to 2 times"),
        ("(a", "a ( that is not closed"),
        ("a)", "a ) that closes nothing"),
        ("[a", "a [ that is not closed"),
        ("[z-a]", "a range of characters that is none"),
        ("a{9999}", "repeats more than 2000 parts"),
        ("(((a{100}){100}){100})", "repeats more than 2000 parts"),
        ("(" * 80 + ")" * 80, "nested deeper than 50"),
        (r"\ud800", "U+D800, which is no character"),
    ],
)
def test_patterns_that_are_refused(pattern: str, complaint: str) -> None:
    with pytest.raises(InputError, match=re.escape(complaint)):
        schema_to_grammar({"type": "object", "properties": {"code": {"type": "string", "pattern": pattern}}})


def test_keywords_that_no_grammar_joins_with_a_pattern_are_refused() -> None:
    for beside in ({"format": "date"}, {"enum": ["a"]}, {"const": "a"}):
        with pytest.raises(InputError, match="pattern"):
            schema_to_grammar({"type": "string", "pattern": "^a$", **beside})
    with pytest.raises(InputError, match="no text of 3 to 5 characters"):
        schema_to_grammar({"type": "string", "pattern": "^a$", "minLength": 3, "maxLength": 5})
