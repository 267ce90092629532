"""JSON schemas that no finite value satisfies, such as an object that requires another one of its kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..constraint import ConstraintError
from .finite import finite_names
from .keywords import LITERALS, NAMED_SCHEMAS, resolve


def without_endless(root: Any) -> Any:
    """A copy of the schema ``root`` in which every subschema that no finite value satisfies is ``false``.

    Raises `ConstraintError`, naming the reference, if that is the whole schema.
    """
    references = sorted(set(_references(root)))
    targets = {reference: resolve({"$ref": reference}, root) for reference in references}

    def is_finite(reference: str, finite: set[str]) -> bool:
        is_local = (reference + "/").startswith("#/")  # llguidance refuses others
        return not is_local or _has_value(targets[reference], finite)

    finite = finite_names(references, is_finite)
    endless = [reference for reference in references if reference not in finite]
    if not endless:
        return root
    if not _has_value(root, finite):
        raise ConstraintError(f"cannot be satisfied: $ref {endless[-1]} requires itself without end")
    return _replaced(root, finite)


def _references(root: Any) -> Iterator[str]:
    pending = [root]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            if isinstance(value.get("$ref"), str):
                yield value["$ref"]
            pending += value.values()
        elif isinstance(value, list):
            pending += value


def _has_value(schema: Any, finite: set[str]) -> bool:
    """Whether a finite value satisfies the schema, as far as its structure says. ``finite``: references that have."""
    if not isinstance(schema, dict):
        return schema is not False
    parts = list(_conjuncts(schema))
    for part in parts:
        if isinstance(part.get("$ref"), str) and part["$ref"] not in finite:
            return False
        for keyword in ("anyOf", "oneOf"):
            branches = part.get(keyword)
            if isinstance(branches, list) and not any(_has_value(branch, finite) for branch in branches):
                return False
    if any("const" in part or "enum" in part for part in parts):
        return True
    types = set.intersection(*(_types(part) for part in parts))
    if not types or types - {"object", "array"}:
        return True
    return ("object" in types and _has_object(parts, finite)) or ("array" in types and _has_array(parts, finite))


def _conjuncts(schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """``schema`` and the branches of its ``allOf``, and of theirs."""
    yield schema
    for branch in schema["allOf"] if isinstance(schema.get("allOf"), list) else ():
        if isinstance(branch, dict):
            yield from _conjuncts(branch)


def _types(schema: Mapping[str, Any]) -> set[str]:
    given = schema.get("type", ["object", "array", "string"])
    return {given} if isinstance(given, str) else {one for one in given if isinstance(one, str)}


def _has_object(parts: Sequence[Mapping[str, Any]], finite: set[str]) -> bool:
    required = {name for part in parts for name in part.get("required") or () if isinstance(name, str)}
    for part in parts:
        properties = part.get("properties")
        declared = properties if isinstance(properties, dict) else {}
        others = part.get("additionalProperties") or True
        if not all(_has_value(declared.get(name, others), finite) for name in required):
            return False
    return True


def _has_array(parts: Sequence[Mapping[str, Any]], finite: set[str]) -> bool:
    least = max((part["minItems"] for part in parts if isinstance(part.get("minItems"), int)), default=0)
    for part in parts:
        first = part["prefixItems"] if isinstance(part.get("prefixItems"), list) else []
        items = [*first[:least], *([part.get("items", True)] if least > len(first) else [])]
        if not all(_has_value(item, finite) for item in items):
            return False
    return True


def _replaced(value: Any, finite: set[str], named: bool = False) -> Any:
    if isinstance(value, list):
        return [_replaced(inner, finite) for inner in value]
    if not isinstance(value, dict):
        return value
    if not named and not _has_value(value, finite):
        return False
    return {
        key: inner if not named and key in LITERALS else _replaced(inner, finite, not named and key in NAMED_SCHEMAS)
        for key, inner in value.items()
    }
