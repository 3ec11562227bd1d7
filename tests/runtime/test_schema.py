"""JSON schemas as grammars: whatever a model samples, the text is JSON that fits."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from support.schemas import GrammarText, is_valid

from qvl.runtime.errors import InputError
from qvl.runtime.grammar.numbers import integers_between, numbers_between
from qvl.runtime.grammar.schema import read_schema, schema_to_grammar
from qvl.runtime.llama.binding import llama
from qvl.runtime.llama.context import Context
from qvl.runtime.llama.model import LlamaModel
from qvl.runtime.llama.sampler import Sampler, Sampling

INF = float("inf")


@pytest.fixture(scope="module")
def context(model: LlamaModel) -> Iterator[Context]:
    with Context(model, n_ctx=2048, threads=1) as opened:
        yield opened


def sample(context: Context, schema: Any, seed: int, most: int = 1500) -> str | None:
    """Text that random weights write under the grammar; None if they do not come to an end."""
    vocab = context.model.vocab
    context.clear()
    context.decode_tokens([1], 0, outputs="last")
    with Sampler(vocab, Sampling(temperature=2.0, seed=seed), schema_to_grammar(schema)) as sampler:
        tokens: list[int] = []
        while len(tokens) < most:
            token = sampler.sample(context)
            if token is None or token in vocab.end_tokens:
                return vocab.detokenize(tokens)
            tokens.append(token)
            context.decode_tokens([token], len(tokens), outputs="last")
    return None


some_values = st.lists(st.none() | st.integers(-5, 5) | st.text(max_size=3), min_size=1)
scalars = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.just({"const": "a\n\"b\\ü"}),
    st.builds(lambda v: {"enum": v}, some_values),
    st.builds(
        lambda a, n: {"type": "integer", "minimum": a, "maximum": a + n},
        st.integers(-2000, 2000), st.integers(0, 3000),
    ),
    st.builds(
        lambda a, n: {"type": "number", "minimum": a, "exclusiveMaximum": a + n},
        st.integers(-20, 20), st.integers(1, 30),
    ),
    st.builds(lambda n: {"type": "string", "minLength": n, "maxLength": n + 4}, st.integers(0, 4)),
    st.just({"type": ["integer", "null"], "minimum": 1, "maximum": 12}),
    st.sampled_from(({"minLength": 1}, {"minimum": 3}, {"pattern": "^[a-c]{1,4}$"})),
    st.just({"maximum": 5, "maxLength": 2}),
    st.just({"type": "string", "pattern": "b+"}),
)  # fmt: skip


def composed(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    names = st.sampled_from(["a", "b", "long name", 'quo"te', "é"])
    return st.one_of(
        st.builds(
            lambda props, k: {"type": "object", "properties": props, "required": list(props)[::2][:k]},
            st.dictionaries(names, inner, min_size=1, max_size=4), st.integers(0, 3),
        ),
        st.builds(
            lambda item, n: {"type": "array", "items": item, "minItems": n, "maxItems": n + 2},
            inner, st.integers(0, 2),
        ),
        st.builds(
            lambda items: {"type": "array", "prefixItems": items, "items": False},
            st.lists(inner, min_size=1, max_size=3),
        ),
        st.builds(lambda choices: {"anyOf": choices}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(lambda choices: {"oneOf": choices}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(
            lambda a, b: {"allOf": [{"properties": a}, {"properties": b, "required": list(b)}]},
            st.dictionaries(names, inner, min_size=1, max_size=2), st.dictionaries(names, inner, max_size=2),
        ),
    )  # fmt: skip


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(schema=st.recursive(scalars, composed, max_leaves=6), seed=st.integers(0, 1000))
def test_what_is_generated_fits(model: LlamaModel, schema: dict[str, Any], seed: int) -> None:
    try:
        with GrammarText(model.vocab, schema) as grammar:
            text = grammar.walk(seed)
    except InputError as e:  # a oneOf or an allOf that cannot be held
        assert re.search(
            "may both fit|twice|without a value|beside an enum|here fits|wants|expected at most|forbids"
            "|no grammar holds",
            e.message,
        ), e
        return
    assume(text is not None)
    assert is_valid(json.loads(text or ""), schema), text


TOLD_APART = {"oneOf": [
    {"properties": {"kind": {"const": "a"}, "n": {"type": "integer"}}, "required": ["kind"]},
    {"properties": {"kind": {"const": "b"}}, "required": []},
]}  # fmt: skip
# Schemas, values that fit, and values that do not: each is written in three ways.
ENUMERATED: list[tuple[dict[str, Any], list[Any], list[Any]]] = [
    ({"type": "object",
      "properties": {"a": {"type": "integer"}, "b": {"type": "array", "items": {"type": "null"}}},
      "required": ["a"], "additionalProperties": False},
     [{"a": 1}, {"a": -20, "b": []}, {"a": 0, "b": [None, None]}],
     [{}, {"b": []}, {"a": 1.5}, {"a": 1, "b": [1]}, {"a": 1, "c": 1}, []]),
    ({"type": "array", "items": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]+$"},
      "minItems": 1, "maxItems": 2},
     [["AB-1"], ["AB-12", "ZZ-0"]], [[], ["ab-1"], ["AB-"], ["AB-1", "AB-2", "AB-3"]]),
    ({"type": "object"}, [{}, {"a": {"b": [1, 2.5, "x", None, True]}}], [[], 1]),
    ({"minLength": 2}, ["ab", "äöü"], ["", "a"]),
    ({"minimum": 3, "maximum": 12}, [3, 7, 12], [2, 13]),
    ({"enum": [{"a": [1, "x"]}, "b", None]}, ["b", None], ["a", 1]),
    (TOLD_APART, [{"kind": "a"}, {"kind": "a", "n": 1}, {"kind": "b"}, {}], [{"kind": "c"}]),
    ({"oneOf": [{"type": "integer", "minimum": 1, "maximum": 3}, {"type": "string"}, {"type": "null"}]},
     [1, 3, "x", None], [4, False, []]),
    ({"properties": {"a": {"minimum": 1}},
      "allOf": [{"properties": {"a": {"type": "integer", "maximum": 3}}}]},
     [{"a": 1}, {"a": 3}, {}], [{"a": 0}, {"a": 4}]),
    ({"type": "string", "format": "date-time"}, ["2024-02-28T23:59:59Z"], ["2024-02-30T00:00:00Z", "now"]),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "good", "bad"), ENUMERATED)
def test_what_fits_can_be_generated(
    model: LlamaModel, schema: dict[str, Any], good: list[Any], bad: list[Any]
) -> None:
    """Compact, on one line with blanks, and on lines with an indent."""
    for value in [*good, *bad]:
        assert is_valid(value, schema) == (value in good) or "format" in schema
        for style in ({"separators": (",", ":")}, {}, {"indent": 2}):
            with GrammarText(model.vocab, schema) as grammar:
                assert grammar.accepts(json.dumps(value, ensure_ascii=False, **style)) == (value in good), (
                    value
                )


def test_white_space_does_not_run_on(model: LlamaModel) -> None:
    """A model that likes blanks cannot fill the reply with them."""
    for text in ("{  }", "{\n\n}", "{\t}", "{\n" + " " * 21 + "}"):
        with GrammarText(model.vocab, {"type": "object"}) as grammar:
            assert not grammar.accepts(text)


SPECIAL: dict[str, dict[str, Any]] = {
    "a tree": {
        "type": "object",
        "properties": {"v": {"type": "integer", "minimum": 0, "maximum": 9},
                       "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
        "required": ["v", "next"],
    },
    "definitions": {"$defs": {"p": {"type": "integer", "minimum": 5, "maximum": 7}},
                    "type": "array", "items": {"$ref": "#/$defs/p"}, "minItems": 3, "maxItems": 3},
    "beside a reference": {"$defs": {"p": {"type": "object", "properties": {"a": {"type": "null"}}}},
                           "$ref": "#/$defs/p", "required": ["a"]},
    "all of": {"allOf": [{"properties": {"a": {"const": 1}}, "required": ["a"]},
                         {"properties": {"b": {"const": 2}}, "required": ["b"]}]},
    "any of required": {"type": "object", "properties": {"a": {"const": 1}, "b": {"const": 2}},
                        "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
    "a map": {"type": "object", "additionalProperties": {"type": "boolean"}},
    "nothing": {"type": "object", "additionalProperties": False},
    "required, not described": {"type": "object", "required": ["x"],
                                "additionalProperties": {"type": "integer", "minimum": 1, "maximum": 2}},
    "more items than are listed": {"type": "array", "prefixItems": [{"const": 1}], "items": {"const": 2},
                                   "minItems": 3},
    "an enum of a type": {"type": "string", "enum": ["a", 1, None]},
    "exclusive bounds": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "whole numbers over a bound": {"type": "integer", "exclusiveMinimum": 999_999_999},
    "negative numbers": {"type": "number", "minimum": -3, "exclusiveMaximum": -1},
}  # fmt: skip


@pytest.mark.parametrize("name", SPECIAL)
def test_special_schemas(context: Context, name: str) -> None:
    for seed in range(6):
        text = sample(context, SPECIAL[name], seed, most=150)
        assert text is not None or name in ("a tree", "a map", "more items than are listed")
        if text is not None:
            value = json.loads(text)
            assert is_valid(value, SPECIAL[name]), text


def test_free_text_is_json_as_far_as_it_goes(context: Context) -> None:
    """Random weights seldom close what they open; when they do, it is JSON (no raw line breaks)."""
    closed = 0
    for seed in range(25):
        text = sample(context, {"type": "string"}, seed, most=60)
        if text is not None:
            assert isinstance(json.loads(text), str)
            closed += 1
    assert closed > 2
    for form, shape in {"date": r"\d{4}-\d\d-\d\d", "uuid": r"[\da-fA-F-]{36}"}.items():
        text = sample(context, {"type": "string", "format": form}, 1)
        assert text is not None and re.fullmatch(shape, json.loads(text))


def allowed_after(context: Context, head: bytes) -> set[int]:
    """The single bytes that the grammar of a string allows after these."""
    vocab = context.model.vocab
    tokens = {vocab.piece(t)[0]: t for t in range(vocab.n_tokens) if len(vocab.piece(t)) == 1}
    assert len(tokens) == 256
    with Sampler(vocab, Sampling(), schema_to_grammar({"type": "string"})) as sampler:
        for byte in head:
            llama().llama_sampler_accept(sampler._grammar, tokens[byte])
        return {byte for byte, token in tokens.items() if sampler._allowed(token)}


def test_a_string_holds_only_characters_of_unicode(context: Context) -> None:
    """Table 3-7 of the Unicode standard: no surrogates, nothing beyond U+10FFFF, no bytes F5 to FF."""
    ascii_ones = {*range(0x20, 0x7F)}
    assert allowed_after(context, b'"') == ascii_ones | {*range(0xC2, 0xF5)}
    assert allowed_after(context, b'"\xc2') == {*range(0x80, 0xC0)}
    assert allowed_after(context, b'"\xed') == {*range(0x80, 0xA0)}  # up to U+D7FF
    assert allowed_after(context, b'"\xee') == {*range(0x80, 0xC0)}  # from U+E000
    assert allowed_after(context, b'"\xf4') == {*range(0x80, 0x90)}  # up to U+10FFFF


@pytest.mark.parametrize(
    ("schema", "complaint"),
    [
        ("[1]", "expected an object"),
        ("{", "is not JSON"),
        ({"type": "colour"}, "type 'colour'"),
        ({"type": []}, "type []"),
        ({"enum": []}, "without values"),
        ({"anyOf": []}, "without choices"),
        ({"type": "string", "pattern": "(?=a)"}, "at root: the pattern '(?=a)' has look-ahead"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems at root, which no grammar holds"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "choices 1 and 2 may both fit"),
        ({"oneOf": [{"type": "null"}], "anyOf": [{"type": "null"}]}, "oneOf beside anyOf"),
        ({"enum": ["a", "bb"], "minLength": 2}, "minLength beside an enum or const"),
        ({"const": "a", "enum": ["b"]}, "enum beside an enum or const"),
        ({"type": "string", "format": "date", "minLength": 2}, "minLength beside format"),
        (
            {"allOf": [{"additionalProperties": False}, {"properties": {"a": {}}}]},
            "additionalProperties in an",
        ),
        ({"allOf": [{"items": {"const": 1}}, {"prefixItems": [{}]}]}, "items in an allOf"),
        ({"type": "object", "properties": {"a": {"multipleOf": 3}}}, "multipleOf at root-a"),
        ({"$ref": "https://example.com/x.json"}, "expected a place in itself"),
        ({"$ref": "#/$defs/x"}, "does not have"),
        ({"type": "string", "minLength": 5, "maxLength": 3}, "has minLength 5 over maxLength 3"),
        ({"type": "array", "minItems": -1}, "-1 for"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "no integer here fits"),
        ({"type": "number", "minimum": 0.2, "maximum": 0.4}, "no number here fits"),
        ({"type": "integer", "minimum": "5"}, "for a bound"),
        ({"type": "string", "format": "email"}, "'email'"),
        ({"type": "object", "required": ["a"], "additionalProperties": False}, "forbids it"),
        ({"allOf": [{"type": "string"}, {"type": "null"}]}, "gives type twice"),
        ({"items": 7}, "7 at root-item"),
        ({"type": "string", "enum": [1, 2]}, "without a value of its type"),
        ({"type": "array", "items": False, "minItems": 1}, "1 more"),
    ],
)
def test_schemas_that_are_refused(schema: Any, complaint: str) -> None:
    with pytest.raises(InputError, match=re.escape(complaint)):
        schema_to_grammar(schema)


def test_a_schema_that_never_ends_is_refused(context: Context) -> None:
    with pytest.raises(InputError, match="grammar cannot be parsed"):
        Sampler(
            context.model.vocab,
            Sampling(),
            schema_to_grammar({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}),
        )


def as_regex(expression: str) -> re.Pattern[str]:
    """A GBNF expression without rule names, as a regular expression."""
    out = re.sub(
        r'"((?:[^"\\]|\\.)*)"|\s+', lambda m: re.escape(m[1]) if m[1] is not None else "", expression
    )
    return re.compile(f"(?:{out})")


bounds = st.integers(-1200, 1200)


@settings(max_examples=150, deadline=None)
@given(bounds, bounds, st.booleans(), st.booleans())
def test_integers_between_every_pair_of_bounds(a: int, b: int, open_low: bool, open_high: bool) -> None:
    low, over = (-INF, a) if open_low else (a, -INF)
    high, under = (INF, b) if open_high else (b, INF)
    expression = integers_between(low, high, over, under)
    expected = [n for n in range(-1300, 1301) if low <= n <= high and over < n < under]
    if not expected:
        assert expression == ""
        return
    pattern = as_regex(expression)
    assert [n for n in range(-1300, 1301) if pattern.fullmatch(str(n))] == expected
    assert not pattern.fullmatch("007") and not pattern.fullmatch("")


@settings(max_examples=150, deadline=None)
@given(st.integers(-12, 12), st.integers(-12, 12), st.booleans(), st.booleans())
def test_numbers_between_whole_bounds(a: int, b: int, open_low: bool, open_high: bool) -> None:
    low, over = (-INF, a) if open_low else (a, -INF)
    high, under = (INF, b) if open_high else (b, INF)
    expression = numbers_between(low, high, over, under)
    tried = sorted({n + f for n in range(-15, 16) for f in (0, 0.25, 0.5, 0.75)})
    expected = [n for n in tried if low <= n <= high and over < n < under]
    if not expression:
        assert not expected
        return
    pattern = as_regex(expression)
    assert [n for n in tried if pattern.fullmatch(f"{n:g}")] == expected
    assert bool(pattern.fullmatch("-0.5")) == (-0.5 in expected)


@pytest.mark.parametrize(("low", "high"), [(0.5, 2.5), (-2.5, 0.5), (-0.5, 0.5), (9.75, 101.25)])
def test_numbers_between_fractions_stay_inside(low: float, high: float) -> None:
    pattern = as_regex(numbers_between(low, high, -INF, INF))
    found = [n / 8 for n in range(-100, 1000) if pattern.fullmatch(f"{n / 8:g}")]
    assert found and min(found) >= low and max(found) <= high


def test_large_bounds() -> None:
    assert as_regex(integers_between(10**15, INF, -INF, INF)).fullmatch(str(10**16 - 1))
    assert not as_regex(integers_between(10**15, INF, -INF, INF)).fullmatch(str(10**15 - 1))
    assert as_regex(integers_between(-INF, -1, -INF, INF)).fullmatch(str(-(10**16) + 1))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "not JSON"),
        ("[1]", "expected a JSON object, found a list"),
        ("[" * 100_000, "not JSON"),
        ('{"type": "string", "pattern": "a{1"}', "pattern"),
    ],
)
def test_a_file_that_is_no_schema_is_named(content: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(content)
    with pytest.raises(InputError, match=rf"s\.json: .*{complaint}"):
        read_schema(tmp_path / "s.json")


def test_a_schema_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text('{"type": "integer"}', encoding="utf-8-sig")
    assert read_schema(tmp_path / "s.json") == {"type": "integer"}


def test_an_all_of_that_doubles_with_each_level_is_refused_at_once() -> None:
    levels = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(60)}
    schema = {"$ref": "#/$defs/d0", "$defs": {**levels, "d60": {"type": "string"}}}
    started = time.process_time()
    with pytest.raises(InputError, match="merges over 1000 parts"):
        schema_to_grammar(schema)
    assert time.process_time() - started < 1


def test_many_properties_take_a_grammar_of_their_number() -> None:
    def length(n: int) -> int:
        properties: dict[str, Any] = {f"p{i}": {"type": "integer"} for i in range(n)}
        return len(schema_to_grammar({"type": "object", "properties": properties}))

    started = time.process_time()
    assert length(900) < 4 * length(300)
    assert time.process_time() - started < 2
    with pytest.raises(InputError, match="over 4000 rules"):
        length(5000)
