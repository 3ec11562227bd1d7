"""Merges what a JSON schema says of one value in several places: allOf, and keywords beside $ref."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from qvl.runtime.errors import InputError
from qvl.runtime.grammar.keywords import NOTES, check_shapes

_MAX_MERGED: Final = 1000  # parts of all allOf together, each counted as often as it is named
_BY_HAND: Final = "merge its allOf by hand"


class Merger:
    """Resolves references within one schema, and merges what stands beside them.

    Args:
        root: the whole schema, in which references point to places.
    """

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._n_merged = 0

    def resolve(self, ref: Any, path: str) -> Mapping[str, Any]:
        """The schema that a reference names. Raises InputError."""
        found: Any = self._root
        if not isinstance(ref, str) or not (ref == "#" or ref.startswith("#/")):
            raise InputError(f"the JSON schema refers to {ref!r} at {path}, expected a place in itself (#/…)")
        for key in ref[2:].split("/") if len(ref) > 1 else ():
            key = key.replace("~1", "/").replace("~0", "~")
            found = found.get(key) if isinstance(found, Mapping) else None
        if not isinstance(found, Mapping):
            raise InputError(f"the JSON schema refers to {ref!r} at {path}, which it does not have")
        return found

    def merged(self, schema: Mapping[str, Any], path: str) -> Mapping[str, Any]:
        """The schema without allOf, and without a $ref that has keywords beside it.

        Raises:
            InputError: parts that cannot be merged, or too many.
        """
        check_shapes(schema, path)
        parts: list[Mapping[str, Any]] = []
        if "$ref" in schema and schema.keys() - NOTES - {"$ref"}:
            parts = [self._inlined(self.resolve(schema["$ref"], path), path)]
        parts += [self._inlined(part, path) for part in schema.get("allOf", ())]
        if not parts:
            return schema
        parts.append({k: v for k, v in schema.items() if k not in ("allOf", "$ref")})
        _check_independent(parts, path)
        merged: dict[str, Any] = {}
        for part in parts:
            for key, value in part.items():
                if key == "properties":
                    merged[key] = _joined(merged.get(key, {}), value)
                elif key == "required":
                    merged[key] = [*merged.get(key, []), *value]
                elif key not in NOTES and merged.get(key, value) != value:
                    raise InputError(f"the JSON schema gives {key} twice at {path}", hint=_BY_HAND)
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
        found = self.merged(part, path)
        return self._inlined(self.resolve(found["$ref"], path), path) if "$ref" in found else found


def _joined(known: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Properties of two parts; what both describe must fit both."""
    both = {
        name: {"allOf": [known[name], new[name]]}
        for name in known.keys() & new.keys()
        if known[name] != new[name]
    }
    return {**known, **new, **both}


def _check_independent(parts: Sequence[Mapping[str, Any]], path: str) -> None:
    """Refuse keywords of one part that would reach what another part describes. Raises InputError."""
    for part in parts:
        others = [other for other in parts if other is not part]
        names = {
            name for other in others for name in (*other.get("properties", ()), *other.get("required", ()))
        }
        if part.get("additionalProperties", True) not in (True, {}) and names - set(
            part.get("properties", ())
        ):
            raise InputError(f"the JSON schema has additionalProperties in an allOf at {path}", hint=_BY_HAND)
        if part.get("items", True) not in (True, {}) and any("prefixItems" in other for other in others):
            raise InputError(f"the JSON schema has items in an allOf at {path}", hint=_BY_HAND)
