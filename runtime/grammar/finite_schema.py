"""JSON schemas that no finite value satisfies, such as an object that requires another one of its kind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..constraint import ConstraintError
from .finite import finite_names
from .keywords import resolve
from .walk import Schema, as_dict, as_list, required, transformed, types, values


def without_endless(root: Any) -> Any:
    """A copy of the schema ``root`` in which every subschema that no finite value satisfies is ``false``.

    Raises `ConstraintError`, naming the reference, if that is the whole schema.
    """
    given = (value["$ref"] for value in values(root) if isinstance(value, dict) and "$ref" in value)
    references = sorted({reference for reference in given if isinstance(reference, str)})
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
    return transformed(root, lambda schema: schema if _has_value(schema, finite) else False)


def _has_value(schema: Any, finite: set[str]) -> bool:
    """Whether a finite value can satisfy the schema, judged by its structure. ``finite``: references with one."""
    if not isinstance(schema, dict):
        return schema is not False
    parts = list(_conjuncts(schema))
    for part in parts:
        if isinstance(part.get("$ref"), str) and part["$ref"] not in finite:
            return False
        if any(branch is False for branch in as_list(part.get("allOf"))):
            return False
        for keyword in ("anyOf", "oneOf"):
            branches = part.get(keyword)
            if isinstance(branches, list) and not any(_has_value(branch, finite) for branch in branches):
                return False
    if any("const" in part or "enum" in part for part in parts):
        return True
    given = [found for part in parts if (found := types(part)) is not None]
    allowed = frozenset.intersection(*given) if given else frozenset()
    if not allowed or allowed - {"object", "array"}:
        return True
    return ("object" in allowed and _has_object(parts, finite)) or ("array" in allowed and _has_array(parts, finite))


def _conjuncts(schema: Schema) -> Iterator[Schema]:
    """``schema`` and the branches of its ``allOf``, and of theirs."""
    yield schema
    for branch in as_list(schema.get("allOf")):
        if isinstance(branch, dict):
            yield from _conjuncts(branch)


def _has_object(parts: Sequence[Schema], finite: set[str]) -> bool:
    names = frozenset().union(*map(required, parts))
    for part in parts:
        declared = as_dict(part.get("properties"))
        others = part.get("additionalProperties") or True
        if not all(_has_value(declared.get(name, others), finite) for name in names):
            return False
    return True


def _has_array(parts: Sequence[Schema], finite: set[str]) -> bool:
    least = max((part["minItems"] for part in parts if isinstance(part.get("minItems"), int)), default=0)
    for part in parts:
        first = as_list(part.get("prefixItems"))
        items = [*first[:least], *([part.get("items", True)] if least > len(first) else [])]
        if not all(_has_value(item, finite) for item in items):
            return False
    return True
