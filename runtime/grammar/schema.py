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
from pathlib import Path
from typing import Any, Final

from qvl.runtime.errors import InputError, check_text, shown
from qvl.runtime.files import parse_json
from qvl.runtime.grammar.numbers import integers_between, numbers_between

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
_TYPES: Final = ("object", "array", "string", "number", "integer", "boolean", "null")
_NOTES: Final = {
    "$schema", "$id", "$comment", "$defs", "definitions", "title", "description", "default", "examples",
    "deprecated", "readOnly", "writeOnly",
}  # fmt: skip
_KNOWN: Final = {
    "type", "enum", "const", "$ref", "anyOf", "oneOf", "allOf", "properties", "required",
    "additionalProperties", "items", "prefixItems", "minItems", "maxItems", "minLength", "maxLength",
    "format", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum",
}  # fmt: skip
_SHAPES: Final = {
    **dict.fromkeys(("properties", "$defs", "definitions"), ("object",)),
    **dict.fromkeys(("required", "allOf", "anyOf", "oneOf", "enum", "prefixItems"), ("array",)),
    **dict.fromkeys(("minItems", "maxItems", "minLength", "maxLength"), ("integer",)),
    "type": ("string", "array"),
    "format": ("string",),
    "$ref": ("string",),
}
_NAMES: Final = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^]\\])*\]|([a-z][a-z0-9-]*)')
_MAX_REPEAT: Final = 2000  # llama.cpp refuses to repeat more often
_MAX_DEPTH: Final = 64
_MAX_RULES: Final = 4000  # llama.cpp parses these in some 50 ms
_MAX_MERGED: Final = 1000  # parts of all allOf together, each counted as often as it is named


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
        self._rules: dict[str, str] = {}
        self._refs: dict[str, str] = {}
        self._n_merged = 0

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
        unknown = schema.keys() - _KNOWN - _NOTES
        if unknown:
            names = ", ".join(sorted(unknown))
            message = f"the JSON schema has {names} at {path}, which no grammar holds"
            raise InputError(message, hint="leave it out")
        schema = self._merged(schema, path)
        for key, convert in self._cases.items():
            if key in schema:
                return convert(self, schema, path, depth + 1)
        return "value"

    def _merged(self, schema: Mapping[str, Any], path: str) -> Mapping[str, Any]:
        """allOf, and what stands beside $ref, as one schema."""
        _check_shapes(schema, path)
        parts: list[Mapping[str, Any]] = []
        if "$ref" in schema and schema.keys() - _NOTES - {"$ref"}:
            parts = [self._resolve(schema["$ref"], path)]
        parts += [self._inlined(part, path) for part in schema.get("allOf", ())]
        if not parts:
            return schema
        merged: dict[str, Any] = {}
        own = {k: v for k, v in schema.items() if k not in ("allOf", "$ref")}
        for part in (*parts, own):
            for key, value in part.items():
                if key == "properties":
                    merged[key] = {**merged.get(key, {}), **value}
                elif key == "required":
                    merged[key] = [*merged.get(key, []), *value]
                elif key not in _NOTES and merged.get(key, value) != value:
                    message = f"the JSON schema gives {key} twice at {path}"
                    raise InputError(message, hint="merge its allOf by hand")
                else:
                    merged[key] = value
        return merged

    def _inlined(self, part: Any, path: str) -> Mapping[str, Any]:
        self._n_merged += 1
        if self._n_merged > _MAX_MERGED:
            raise InputError(
                f"the JSON schema merges over {_MAX_MERGED} parts at {path}", hint="shorten its allOf"
            )
        if not isinstance(part, Mapping):
            raise InputError(f"the JSON schema has {part!r:.60} in an allOf at {path}, expected an object")
        return self._merged(self._resolve(part["$ref"], path) if "$ref" in part else part, path)

    def _resolve(self, ref: Any, path: str) -> Mapping[str, Any]:
        found: Any = self._root
        if not isinstance(ref, str) or not (ref == "#" or ref.startswith("#/")):
            raise InputError(f"the JSON schema refers to {ref!r} at {path}, expected a place in itself (#/…)")
        for key in ref[2:].split("/") if len(ref) > 1 else ():
            key = key.replace("~1", "/").replace("~0", "~")
            found = found.get(key) if isinstance(found, Mapping) else None
        if not isinstance(found, Mapping):
            raise InputError(f"the JSON schema refers to {ref!r} at {path}, which it does not have")
        return found

    # what each keyword stands for, in the order they are looked at

    def _ref(self, schema: Mapping[str, Any], path: str, depth: int) -> str:
        ref = schema["$ref"]
        if ref not in self._refs:
            target = self._resolve(ref, path)
            self._refs[ref] = name = self._rule(str(ref), "")
            self._rules[name] = self._visit(target, str(ref), depth)
        return self._refs[ref]

    def _constant(self, schema: Mapping[str, Any], path: str, depth: int) -> str:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        if not isinstance(values, Sequence) or isinstance(values, str) or not values:
            raise InputError(f"the JSON schema has an enum without values at {path}")
        kinds = schema.get("type", _TYPES)
        values = [v for v in values if any(_is(v, k) for k in ([kinds] if isinstance(kinds, str) else kinds))]
        if not values:
            raise InputError(f"the JSON schema has an enum at {path} without a value of its type")
        return _choice(_literal(json.dumps(value, ensure_ascii=False)) for value in values)

    def _union(self, schema: Mapping[str, Any], path: str, depth: int) -> str:
        key = "anyOf" if "anyOf" in schema else "oneOf"
        beside = {k: v for k, v in schema.items() if k not in (key, *_NOTES)}
        if not isinstance(schema[key], Sequence) or not schema[key]:
            raise InputError(f"the JSON schema has {key} without choices at {path}")
        choices = [{"allOf": [beside, part]} if beside else part for part in schema[key]]
        return _choice(self._visit(part, f"{path}-{i}", depth) for i, part in enumerate(choices))

    def _typed(self, schema: Mapping[str, Any], path: str, depth: int) -> str:
        kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        if not kinds or any(kind not in _TYPES for kind in kinds):
            known = ", ".join(_TYPES)
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
        least, most = self._bounds(schema, "Items", path)
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
        if "format" in schema:
            if schema["format"] not in _FORMATS:
                known = ", ".join(_FORMATS)
                found = schema["format"]
                raise InputError(f"the JSON schema has format {found!r} at {path}, expected {known}")
            return rf'"\"" {_FORMATS[schema["format"]]} "\""'
        least, most = self._bounds(schema, "Length", path)
        if most is not None and most > _MAX_REPEAT:
            most = None  # longer than any reply
        return "string" if not least and most is None else rf'"\"" char{_repeat(least, most)} "\""'

    def _bounds(self, schema: Mapping[str, Any], of: str, path: str) -> tuple[int, int | None]:
        least, most = schema.get(f"min{of}", 0), schema.get(f"max{of}")
        for value in (least, 0 if most is None else most):
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise InputError(f"the JSON schema has {value!r} for {of} at {path}, expected a whole number")
        if least > _MAX_REPEAT or (most is not None and most < least):
            raise InputError(f"the JSON schema wants {least} to {most} {of} at {path}")
        return least, most

    def _number(self, schema: Mapping[str, Any], path: str, depth: int) -> str:
        low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
        over, under = schema.get("exclusiveMinimum", -math.inf), schema.get("exclusiveMaximum", math.inf)
        for value in (low, high, over, under):
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            too_large = is_number and math.inf != abs(value) > 10**300  # beyond what a float holds
            if not is_number or value != value or too_large:
                raise InputError(
                    f"the JSON schema has {shown(value)} for a bound at {path}, expected a number"
                )
        kind = schema["type"]
        if (low, high, over, under) == (-math.inf, math.inf, -math.inf, math.inf):
            return str(kind)
        between = integers_between if kind == "integer" else numbers_between
        found = between(low, high, over, under)
        if not found:
            raise InputError(f"the JSON schema has bounds at {path} that no {kind} here fits")
        return self._rule(f"{path}-{kind}", found)

    _cases: Final[dict[str, Callable[[_Converter, Mapping[str, Any], str, int], str]]] = {
        "$ref": _ref,
        "const": _constant,
        "enum": _constant,
        "anyOf": _union,
        "oneOf": _union,
        "type": _typed,
        "properties": lambda self, schema, path, depth: self._object(schema, path, depth),
        "required": lambda self, schema, path, depth: self._object(schema, path, depth),
        "items": lambda self, schema, path, depth: self._array(schema, path, depth),
        "prefixItems": lambda self, schema, path, depth: self._array(schema, path, depth),
    }


def _check_shapes(schema: Mapping[str, Any], path: str) -> None:
    """See that keywords have values of the types that the vocabulary gives them."""
    for key, kinds in _SHAPES.items():
        if key in schema and not any(_is(schema[key], kind) for kind in kinds):
            raise InputError(
                f"the JSON schema has {key} {shown(schema[key])} at {path}, expected {' or '.join(kinds)}"
            )
    for key in ("required", "type"):
        if isinstance(schema.get(key), list) and not all(isinstance(name, str) for name in schema[key]):
            raise InputError(f"the JSON schema has {key} {shown(schema[key])} at {path}, expected strings")


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool) or value is None:
        return kind == ("null" if value is None else "boolean")
    if kind == "integer":
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    types: dict[str, Any] = {"object": dict, "array": list, "string": str, "number": int | float}
    return kind in types and isinstance(value, types[kind])


def _choice(expressions: Any) -> str:
    choices = list(dict.fromkeys(expressions))
    return choices[0] if len(choices) == 1 else "( " + " | ".join(choices) + " )"


def _repeat(least: int, most: int | None) -> str:
    return f"{{{least},{'' if most is None else most}}}"


def _literal(text: str) -> str:
    escapes = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return '"' + "".join(escapes.get(c, c) for c in text) + '"'
