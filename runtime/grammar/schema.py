"""JSON schema to a GBNF grammar, for llama.cpp's grammar sampler.

What the grammar accepts is JSON that fits the schema: no more, though less where a grammar cannot say it
all. Properties come in the schema's order, and only those it names; numbers have at most sixteen digits. A
keyword that cannot be held is refused rather than left out. (llama-cpp-python's own converter lets raw
line breaks into strings and leaves bounds on numbers out.)

GBNF: llama.cpp, grammars/README.md. JSON schema: draft 2020-12, core and validation vocabularies.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, combinations
from pathlib import Path
from typing import Any, Final

from qvl.runtime.errors import InputError, check_text
from qvl.runtime.files import parse_json
from qvl.runtime.grammar.disjoint import told_apart
from qvl.runtime.grammar.keywords import (
    KINDS,
    NOTES,
    TYPES,
    bounds_of,
    check_known,
    is_of_type,
    sizes_of,
    types_of,
)
from qvl.runtime.grammar.merge import Merger
from qvl.runtime.grammar.numbers import integers_between, numbers_between
from qvl.runtime.grammar.pattern import pattern_to_gbnf

_BUILT_IN: Final = {
    # one space or one line break with its indent, where JSON allows any white space
    "ws": r'( " " | "\n" " "{0,20} )?',
    # Ranges, since llama.cpp reads bytes that are no UTF-8 as a character, which all but ranges would allow.
    "char": r'[ !#-\x5B\x5D-~\u0080-\uD7FF\uE000-\U0010FFFF] | "\\" ( ["\\/bfnrt] | "u" code )',
    "code": "[0-9a-cA-CefEF] hex{3} | [dD] [0-7] hex{2}",  # no half of a surrogate pair
    "hex": "[0-9a-fA-F]",
    "string": r'"\"" char* "\""',
    "integer": r'"-"? whole',
    "number": r'"-"? whole ( "." [0-9]{1,16} )? ( [eE] [-+]? [0-9]{1,2} )?',
    "whole": "[0-9] | [1-9] [0-9]{1,15}",
    "boolean": '"true" | "false"',
    "null": '"null"',
    "object": r'"{" ws ( pair ( "," ws pair )* )? "}"',
    "pair": r'string ws ":" ws value ws',
    "array": r'"[" ws ( value ws ( "," ws value ws )* )? "]"',
    "value": "object | array | string | number | boolean | null",
    "date": '[0-9]{4} "-" ( "0" [1-9] | "1" [0-2] ) "-" ( "0" [1-9] | "1" [0-9] | "2" [0-8] )',
    "time": '( [01] [0-9] | "2" [0-3] ) ":" [0-5] [0-9] ":" [0-5] [0-9] "Z"',
    "uuid": 'hex{8} "-" hex{4} "-" hex{4} "-" hex{4} "-" hex{12}',
}
_FORMATS: Final = {"date": "date", "time": "time", "date-time": 'date "T" time', "uuid": "uuid"}
_NAMES: Final = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^]\\])*\]|([a-z][a-z0-9-]*)')
_MAX_REPEAT: Final = 2000  # llama.cpp refuses to repeat more often
_MAX_ITEMS: Final = _MAX_REPEAT // 2  # an item and the comma before it are two rules
_MAX_DEPTH: Final = 64
_MAX_RULES: Final = 4000  # llama.cpp parses these in some 50 ms


def read_schema(path: Path) -> dict[str, Any]:
    """A JSON schema from a file, which `schema_to_grammar` takes.

    Raises:
        InputError: it cannot be read, is no JSON object, or says what no grammar can hold.
    """
    hint = "`schema` takes a JSON schema"
    try:
        schema = parse_json(path.read_text(encoding="utf-8-sig"))
    except OSError as e:
        raise InputError(f"{path}: cannot be read: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}: not JSON: {e}", hint=hint) from e
    if not isinstance(schema, dict):
        raise InputError(f"{path}: expected a JSON object, found a {type(schema).__name__}", hint=hint)
    try:
        schema_to_grammar(schema)
    except InputError as e:
        raise InputError(f"{path}: {e.message}", hint=e.hint) from e
    return schema


def schema_to_grammar(schema: Mapping[str, Any] | str) -> str:
    """The grammar of a JSON schema, given as an object or as JSON text.

    Raises:
        InputError: not a JSON schema, one that nothing fits, or one with a keyword that no grammar holds.
    """
    if isinstance(schema, str):
        try:
            schema = parse_json(schema)
        except ValueError as e:
            raise InputError(f"the JSON schema is not JSON: {e}") from e
    if not isinstance(schema, Mapping):
        raise InputError(f"the JSON schema is {type(schema).__name__}, expected an object")
    return check_text("the JSON schema", _Converter(schema).grammar())


class _Converter:
    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._merge = Merger(root)
        self._rules: dict[str, str] = {}
        self._refs: dict[str, str] = {}
        self._sets: dict[str, str] = {}

    def grammar(self) -> str:
        self._rules["root"] = ""  # first in the file
        self._rules["root"] = self._visit(self._root, "root", 0)
        self._add_built_in()
        return "\n".join(f"{name} ::= {body}" for name, body in self._rules.items()) + "\n"

    def _add_built_in(self) -> None:
        wanted = [*self._rules.values()]
        while wanted:
            for name in _NAMES.findall(wanted.pop()):
                if name in _BUILT_IN and name not in self._rules:
                    self._rules[name] = _BUILT_IN[name]
                    wanted.append(_BUILT_IN[name])

    def _rule(self, hint: str, body: str) -> str:
        if len(self._rules) >= _MAX_RULES:
            raise InputError(f"the JSON schema needs a grammar of over {_MAX_RULES} rules", hint="shorten it")
        base = "r-" + (re.sub(r"[^a-z0-9]+", "-", hint.lower()).strip("-") or "x")
        name, n = base, 1
        while name in self._rules:
            n += 1
            name = f"{base}-{n}"
        self._rules[name] = body
        return name

    def _visit(self, schema: Any, path: str, depth: int) -> str:
        """An expression for the values that fit."""
        if schema is True or schema == {}:
            return "value"
        if not isinstance(schema, Mapping):
            raise InputError(f"the JSON schema has {schema!r:.60} at {path}, expected an object")
        if depth > _MAX_DEPTH:
            raise InputError(f"the JSON schema is nested deeper than {_MAX_DEPTH} at {path}")
        check_known(schema, path)
        schema = self._merge.merged(schema, path)
        check_known(schema, path)
        for key, convert in self._cases.items():
            if key in schema:
                return convert(self, schema, path, depth + 1)
        return "value"

    # what each keyword stands for, in the order they are looked at

    def _ref(self, schema: Mapping[str, Any], path: str, depth: int) -> str:
        ref = schema["$ref"]
        if ref not in self._refs:
            target = self._merge.resolve(ref, path)
            self._refs[ref] = name = self._rule(str(ref), "")
            self._rules[name] = self._visit(target, str(ref), depth)
        return self._refs[ref]

    def _constant(self, schema: Mapping[str, Any], path: str, depth: int) -> str:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        if not isinstance(values, Sequence) or isinstance(values, str) or not values:
            raise InputError(f"the JSON schema has an enum without values at {path}")
        beside = schema.keys() - NOTES - {"const", "enum", "type"}
        if "const" in schema and schema.get("enum", [schema["const"]]) != [schema["const"]]:
            beside.add("enum")
        if beside:
            names = ", ".join(sorted(beside))
            raise InputError(
                f"the JSON schema has {names} beside an enum or const at {path}", hint="leave it out"
            )
        values = [v for v in values if any(is_of_type(v, kind) for kind in types_of(schema))]
        if not values:
            raise InputError(f"the JSON schema has an enum at {path} without a value of its type")
        return _choice(_literal(json.dumps(value, ensure_ascii=False)) for value in values)

    def _union(self, schema: Mapping[str, Any], path: str, depth: int) -> str:
        key = "anyOf" if "anyOf" in schema else "oneOf"
        if key == "anyOf" and "oneOf" in schema:
            raise InputError(f"the JSON schema has oneOf beside anyOf at {path}", hint="leave one out")
        beside = {k: v for k, v in schema.items() if k not in (key, *NOTES)}
        if not isinstance(schema[key], Sequence) or not schema[key]:
            raise InputError(f"the JSON schema has {key} without choices at {path}")
        choices = schema[key] if key == "anyOf" else self._exclusive(schema[key], path)
        choices = [{"allOf": [beside, part]} if beside else part for part in choices]
        return _choice(self._visit(part, f"{path}-{i}", depth) for i, part in enumerate(choices))

    def _exclusive(self, choices: Sequence[Any], path: str) -> list[Any]:
        """The choices of a oneOf, each with the properties required that tell it from the others."""
        required: list[set[str]] = [set() for _ in choices]
        for i, j in combinations(range(len(choices)), 2):
            apart = told_apart(choices[i], choices[j], self._whole)
            if apart is False:
                raise InputError(
                    f"the JSON schema has a oneOf at {path} whose choices {i + 1} and {j + 1} may both fit",
                    hint="anyOf allows that; or give both a property with another const",
                )
            if isinstance(apart, str):
                required[i].add(apart)
                required[j].add(apart)
        return [
            {"allOf": [choice, {"required": sorted(names)}]} if names else choice
            for choice, names in zip(choices, required, strict=True)
        ]

    def _whole(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        """The schema without references and allOf."""
        return self._merge.merged({"allOf": [schema]}, "a oneOf")

    def _typed(self, schema: Mapping[str, Any], path: str, depth: int) -> str:
        kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        if not kinds or any(kind not in TYPES for kind in kinds):
            known = ", ".join(TYPES)
            raise InputError(f"the JSON schema has type {schema['type']!r} at {path}, expected {known}")
        convert: dict[str, Callable[[Mapping[str, Any], str, int], str]] = {
            "object": self._object, "array": self._array, "string": self._string,
            "number": self._number, "integer": self._number,
        }  # fmt: skip
        return _choice(
            convert[kind]({**schema, "type": kind}, path, depth) if kind in convert else kind
            for kind in kinds
        )

    def _object(self, schema: Mapping[str, Any], path: str, depth: int) -> str:
        extra = schema.get("additionalProperties", True)
        named: dict[str, Any] = dict(schema.get("properties", {}))
        required = schema.get("required", [])
        for name in required:
            if name not in named and extra is False:
                raise InputError(f"the JSON schema requires {name!r} at {path} and forbids it")
            named.setdefault(name, extra)
        if not named:
            if extra is False:
                return '"{" ws "}"'
            if extra is True:
                return "object"
            value = self._visit(extra, f"{path}-value", depth)
            pair = self._rule(f"{path}-pair", f'string ws ":" ws {value} ws')
            return f'"{{" ws ( {pair} ( "," ws {pair} )* )? "}}"'
        pairs = []
        for name, part in named.items():
            value = self._visit(part, f"{path}-{name}", depth)
            key = _literal(json.dumps(name, ensure_ascii=False))
            pairs.append((self._rule(f"{path}-{name}", f'{key} ws ":" ws {value} ws'), name in required))
        return f'"{{" ws {self._pairs(pairs, path)} "}}"'

    def _pairs(self, pairs: list[tuple[str, bool]], path: str) -> str:
        """Pairs in order, optional ones left out, with commas between what is there.

        What may follow a pair is one rule, however many begin with it, so that the grammar grows with the
        number of properties and not with its square.
        """
        first = after = '""'
        for i, (name, needed) in enumerate(reversed(pairs)):
            tail = "" if after == '""' else f" {after}"
            first = f"{name}{tail}" if needed else f"( {name}{tail} | {first} )"
            follows = f'"," ws {name}{tail}' if needed else f'( "," ws {name} )?{tail}'
            if i + 1 < len(pairs):
                after = self._rule(f"{path}-after", follows)
                first = first if needed or len(first) < 40 else self._rule(f"{path}-first", first)
        return first

    def _array(self, schema: Mapping[str, Any], path: str, depth: int) -> str:
        least, most = sizes_of(schema, "Items", path, _MAX_ITEMS)
        if most is not None and most > _MAX_ITEMS:
            most = None  # longer than any reply
        first = [self._visit(p, f"{path}-{i}", depth) for i, p in enumerate(schema.get("prefixItems", ()))]
        items = schema.get("items", True)
        if first:
            first = first[: most if most is not None else len(first)]
            least, most = max(0, least - len(first)), max(0, least - len(first))
        if items is False or most == 0:
            if least:
                raise InputError(f"the JSON schema wants {least} more items at {path} than it allows")
            rest = ""
        else:
            rest = self._visit(items, f"{path}-item", depth)
        if first:
            more = f' ( "," ws {rest} ws ){{{least}}}' if rest and least else ""
            return '"[" ws ' + ' "," ws '.join(f"{item} ws" for item in first) + more + ' "]"'
        if not rest:
            return '"[" ws "]"'
        count = _repeat(max(0, least - 1), None if most is None else most - 1)
        inner = f'{rest} ws ( "," ws {rest} ws ){count}'
        return f'"[" ws {inner} "]"' if least else f'"[" ws ( {inner} )? "]"'

    def _string(self, schema: Mapping[str, Any], path: str, depth: int) -> str:
        least, most = sizes_of(schema, "Length", path, _MAX_REPEAT)
        if "format" in schema:
            if schema["format"] not in _FORMATS:
                known = ", ".join(_FORMATS)
                found = schema["format"]
                raise InputError(f"the JSON schema has format {found!r} at {path}, expected {known}")
            if beside := sorted(schema.keys() & {"pattern", "minLength", "maxLength"}):
                names = ", ".join(beside)
                raise InputError(f"the JSON schema has {names} beside format at {path}", hint="leave one out")
            return rf'"\"" {_FORMATS[schema["format"]]} "\""'
        if "pattern" in schema:
            try:
                body = pattern_to_gbnf(schema["pattern"], least, most, self._set)
            except InputError as e:
                raise InputError(f"the JSON schema at {path}: {e.message}", hint=e.hint) from e
            return self._rule(f"{path}-pattern", rf'"\"" {body} "\""')
        if most is not None and most > _MAX_REPEAT:
            most = None  # longer than any reply
        return "string" if not least and most is None else rf'"\"" char{_repeat(least, most)} "\""'

    def _set(self, body: str) -> str:
        """A rule for characters of a pattern, one for all that are equal."""
        if body not in self._sets:
            self._sets[body] = self._rule("set", body)
        return self._sets[body]

    def _number(self, schema: Mapping[str, Any], path: str, depth: int) -> str:
        bounds = bounds_of(schema, path)
        kind = schema["type"]
        if bounds == (-math.inf, math.inf, -math.inf, math.inf):
            return str(kind)
        found = (integers_between if kind == "integer" else numbers_between)(*bounds)
        if not found:
            raise InputError(f"the JSON schema has bounds at {path} that no {kind} here fits")
        return self._rule(f"{path}-{kind}", found)

    def _by_keyword(self, schema: Mapping[str, Any], path: str, depth: int) -> str:
        """A schema without `type`: of its keywords' types, which is less than the schema allows."""
        kinds = [kind for kind, keys in KINDS.items() if not schema.keys().isdisjoint(keys)]
        return self._typed({**schema, "type": kinds}, path, depth)

    _cases: Final[dict[str, Callable[[_Converter, Mapping[str, Any], str, int], str]]] = {
        "$ref": _ref,
        "const": _constant,
        "enum": _constant,
        "anyOf": _union,
        "oneOf": _union,
        "type": _typed,
        **dict.fromkeys(chain(*KINDS.values()), _by_keyword),
    }


def _choice(expressions: Any) -> str:
    choices = list(dict.fromkeys(expressions))
    return choices[0] if len(choices) == 1 else "( " + " | ".join(choices) + " )"


def _repeat(least: int, most: int | None) -> str:
    return f"{{{least},{'' if most is None else most}}}"


def _literal(text: str) -> str:
    escapes = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return '"' + "".join(escapes.get(c, c) for c in text) + '"'
