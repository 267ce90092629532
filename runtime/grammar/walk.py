"""JSON schemas as trees: the schemas inside a schema, and readers of keywords whose values may have any type."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

Schema = dict[str, Any]

NAMED_SCHEMAS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
LITERALS = frozenset({"const", "enum", "default", "examples", "example"})  # their values are data, not schemas


def schemas(value: Any, named: bool = False) -> Iterator[Schema]:
    """Every schema in ``value``. ``named``: its keys are names that the schema's author chose (``properties``)."""
    if isinstance(value, list):
        for inner in value:
            yield from schemas(inner)
    elif isinstance(value, dict):
        if not named:
            yield value
        for key, inner in value.items():
            if named or key not in LITERALS:
                yield from schemas(inner, not named and key in NAMED_SCHEMAS)


def transformed(value: Any, change: Callable[[Schema], Any], named: bool = False) -> Any:
    """A copy of ``value`` in which each schema, innermost first, is what ``change`` makes of a copy of it."""
    if isinstance(value, list):
        return [transformed(inner, change) for inner in value]
    if not isinstance(value, dict):
        return value
    copy = {
        key: inner if not named and key in LITERALS else transformed(inner, change, not named and key in NAMED_SCHEMAS)
        for key, inner in value.items()
    }
    return copy if named else change(copy)


def values(root: Any) -> Iterator[Any]:
    """``root`` and every value inside it, data or schema."""
    pending = [root]
    while pending:
        value = pending.pop()
        yield value
        pending += inside(value)


def inside(value: Any) -> list[Any]:
    """The values of an object or a list."""
    return list(value.values()) if isinstance(value, dict) else as_list(value)


def types(schema: Schema) -> frozenset[str] | None:
    """The types that the schema's ``type`` allows; None: any."""
    given = schema.get("type")
    if isinstance(given, str):
        return frozenset([given])
    return frozenset(one for one in given if isinstance(one, str)) if isinstance(given, list) else None


def required(schema: Schema) -> frozenset[str]:
    return frozenset(name for name in as_list(schema.get("required")) if isinstance(name, str))


def as_dict(value: Any) -> Schema:
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
