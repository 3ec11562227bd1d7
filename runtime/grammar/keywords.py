"""The keywords of JSON schemas that a grammar can hold, and the shapes of their values.

JSON schema: draft 2020-12, core and validation vocabularies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from qvl.runtime.errors import InputError, shown

TYPES: Final = ("object", "array", "string", "number", "integer", "boolean", "null")
NOTES: Final = {
    "$schema", "$id", "$comment", "$defs", "definitions", "title", "description", "default", "examples",
    "deprecated", "readOnly", "writeOnly",
}  # fmt: skip
"""Keywords that say nothing about which values fit."""

KINDS: Final = {
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    "object": ("properties", "required", "additionalProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
}
"""Keywords about values of one type; they say nothing about the others."""

KNOWN: Final = {"type", "enum", "const", "$ref", "anyOf", "oneOf", "allOf"}.union(*KINDS.values())
_SHAPES: Final = {
    **dict.fromkeys(("properties", "$defs", "definitions"), ("object",)),
    **dict.fromkeys(("required", "allOf", "anyOf", "oneOf", "enum", "prefixItems"), ("array",)),
    **dict.fromkeys(("minItems", "maxItems", "minLength", "maxLength"), ("integer",)),
    "type": ("string", "array"),
    **dict.fromkeys(("format", "pattern", "$ref"), ("string",)),
}


def check_known(schema: Mapping[str, Any], path: str) -> None:
    """Refuse keywords that no grammar holds. Raises InputError."""
    if unknown := schema.keys() - KNOWN - NOTES:
        names = ", ".join(sorted(unknown))
        raise InputError(
            f"the JSON schema has {names} at {path}, which no grammar holds", hint="leave it out"
        )


def check_shapes(schema: Mapping[str, Any], path: str) -> None:
    """Check that keywords have values of the types that the vocabulary gives them. Raises InputError."""
    for key, kinds in _SHAPES.items():
        if key in schema and not any(is_of_type(schema[key], kind) for kind in kinds):
            raise InputError(
                f"the JSON schema has {key} {shown(schema[key])} at {path}, expected {' or '.join(kinds)}"
            )
    for key in ("required", "type"):
        if isinstance(schema.get(key), list) and not all(isinstance(name, str) for name in schema[key]):
            raise InputError(f"the JSON schema has {key} {shown(schema[key])} at {path}, expected strings")


def is_of_type(value: Any, kind: str) -> bool:
    """Return whether a JSON value has a type of the vocabulary."""
    if isinstance(value, bool) or value is None:
        return kind == ("null" if value is None else "boolean")
    if kind == "integer":
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    types: dict[str, Any] = {"object": dict, "array": list, "string": str, "number": int | float}
    return kind in types and isinstance(value, types[kind])


def types_of(schema: Mapping[str, Any]) -> tuple[str, ...]:
    """The types that a schema allows by its `type`; all of them without one."""
    kinds = schema.get("type", TYPES)
    return (kinds,) if isinstance(kinds, str) else tuple(kinds)


def bounds_of(schema: Mapping[str, Any], path: str) -> tuple[float, float, float, float]:
    """minimum, maximum, exclusiveMinimum and exclusiveMaximum, infinite where there is none.

    Raises:
        InputError: a bound that is no number, or beyond what a float holds.
    """
    low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
    over, under = schema.get("exclusiveMinimum", -math.inf), schema.get("exclusiveMaximum", math.inf)
    for value in (low, high, over, under):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or value != value or math.inf != abs(value) > 10**300:
            raise InputError(f"the JSON schema has {shown(value)} for a bound at {path}, expected a number")
    return low, high, over, under


def sizes_of(schema: Mapping[str, Any], of: str, path: str, largest: int) -> tuple[int, int | None]:
    """minItems and maxItems, or minLength and maxLength.

    Args:
        of: "Items" or "Length".
        largest: that a grammar can count to; more than that at least is refused.

    Raises:
        InputError: not whole numbers, or nothing between them.
    """
    least, most = schema.get(f"min{of}", 0), schema.get(f"max{of}")
    for value in (least, 0 if most is None else most):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise InputError(f"the JSON schema has {value!r} for {of} at {path}, expected a whole number")
    if most is not None and most < least:
        raise InputError(f"the JSON schema has min{of} {least} over max{of} {most} at {path}")
    if least > largest:
        raise InputError(f"the JSON schema has min{of} {least} at {path}, expected at most {largest}")
    return least, most
