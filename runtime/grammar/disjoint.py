"""Tells the choices of a oneOf apart: a value must fit one of them alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from qvl.runtime.grammar.keywords import KINDS, TYPES, is_of_type, types_of

_MAX_DEPTH: Final = 8

Merge = Callable[[Any], Mapping[str, Any]]


def told_apart(left: Any, right: Any, merge: Merge, depth: int = 0) -> str | bool:
    """Return whether no value written for one schema fits the other too.

    Args:
        merge: gives a schema without references and allOf.

    Returns:
        The name of a property where that holds once both require it.
    """
    if not isinstance(left, Mapping) or not isinstance(right, Mapping) or depth > _MAX_DEPTH:
        return False
    left, right = merge(left), merge(right)
    ours, theirs = _values(left), _values(right)
    if ours is not None and theirs is not None:
        return not any(value == other for value in ours for other in theirs)
    shared = (_written(left) & _types(right)) | (_written(right) & _types(left))
    if shared - {"object"}:
        return False
    mine, other = left.get("properties", {}), right.get("properties", {})
    apart = [
        name
        for name in mine
        if name in other and told_apart(mine[name], other[name], merge, depth + 1) is True
    ]
    required = {*left.get("required", ()), *right.get("required", ())}
    return not shared or not required.isdisjoint(apart) or next(iter(apart), False)


def _values(schema: Mapping[str, Any]) -> list[Any] | None:
    """The values that a const or an enum lists; None without one."""
    return [schema["const"]] if "const" in schema else schema.get("enum")


def _types(schema: Mapping[str, Any]) -> set[str]:
    """The types that a schema allows; a whole number is a number."""
    values = _values(schema)
    found = (
        types_of(schema) if values is None else [t for t in TYPES if any(is_of_type(v, t) for v in values)]
    )
    return {"number" if kind == "integer" else kind for kind in found}


def _written(schema: Mapping[str, Any]) -> set[str]:
    """The types that a grammar of the schema writes: without `type`, those of its keywords."""
    kinds = {kind for kind, keys in KINDS.items() if not schema.keys().isdisjoint(keys)}
    return (
        kinds if kinds and not schema.keys() & {"type", "const", "enum", "anyOf", "oneOf"} else _types(schema)
    )
