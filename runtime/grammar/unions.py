"""``oneOf`` that is the same as ``anyOf``, because no value can satisfy two of its branches."""

from __future__ import annotations

from itertools import combinations
from typing import Any

from .walk import Schema, as_dict, required, types

_TYPES = frozenset({"string", "number", "integer", "boolean", "null", "array", "object"})
_MAX_COMPARED = 64  # objects compared pair by pair: more would hold the GIL for seconds


def exclusive(branches: list[Any]) -> bool:
    """Whether it is plain, from types and tag properties, that no value satisfies two of ``branches``."""
    taken: set[str] = set()
    objects: list[Schema] = []
    for branch in branches:
        if not isinstance(branch, dict):
            return False
        types = _types(branch)
        if types == {"object"}:
            objects.append(branch)
        elif types & taken:
            return False
        else:
            taken |= types
    if objects and "object" in taken:
        return False
    shared = frozenset.intersection(*map(required, objects)) if objects else frozenset()
    for name in shared:  # a tag that all objects have: no need to compare pairs
        tags = [_tags(branch, name) for branch in objects]
        if all(tags) and sum(map(len, tags)) == len(frozenset().union(*tags)):
            return True
    return len(objects) <= _MAX_COMPARED and all(_tagged_apart(a, b) for a, b in combinations(objects, 2))


def _tagged_apart(a: Schema, b: Schema) -> bool:
    """Whether two object schemas require a property that cannot be the same string in both."""
    shared = required(a) & required(b)
    return any(_tags(a, name) and _tags(b, name) and not _tags(a, name) & _tags(b, name) for name in shared)


def _types(schema: Schema) -> frozenset[str]:
    found = types(schema)
    found = _TYPES if found is None else found
    return found | {"integer"} if "number" in found else found


def _tags(schema: Schema, name: str) -> frozenset[str]:
    """The strings that a property is limited to; empty if it is not limited."""
    tag = as_dict(schema.get("properties")).get(name)
    if not isinstance(tag, dict):
        return frozenset()
    values = [tag["const"]] if "const" in tag else tag.get("enum")
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        return frozenset()
    return frozenset(values)
