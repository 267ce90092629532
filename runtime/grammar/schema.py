"""A JSON schema before it is compiled: parsed, bounded, and rewritten for llguidance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from ..constraint import ConstraintError
from .finite_schema import without_endless
from .keywords import accepts_all, check, declared_names, resolve, simplified
from .unions import exclusive
from .walk import Schema, as_list, inside, required, schemas, transformed

MAX_DEPTH = 64  # nested objects and lists
MAX_VALUES = 20_000  # objects, lists, strings and numbers in total

# A space, or a line break and its indentation. Small models fall into unbounded whitespace and never leave it.
WHITESPACE = r" ?|\n[ \t]{0,40}"
_OPTIONS = {"lenient": False, "whitespace_pattern": WHITESPACE}


def parse(text: str) -> Any:
    """``text`` as a schema in the form that llguidance takes. Raises `ConstraintError` for what cannot be enforced.

    Every value that satisfies the result satisfies the schema in ``text``.
    """
    try:
        schema = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ConstraintError(f"is not valid JSON: {error}") from error
    if not isinstance(schema, (dict, bool)):
        raise ConstraintError(f"must be a JSON object, got {type(schema).__name__}")
    _bound(schema)
    if not any(map(_composes, schemas(schema))):
        schema = transformed(schema, _closed)
    written, names = schema, declared_names(schema)
    schema = transformed(schema, lambda inner: _rewritten(inner, written, names))
    if schema is False and written is not False:
        raise ConstraintError("uses not, of a schema that every value satisfies: no value satisfies this one")
    schema = without_endless(schema)
    check(schema)
    return {**schema, "x-guidance": _OPTIONS} if isinstance(schema, dict) else schema


def _bound(schema: Any) -> None:
    level, values = [schema], 0
    for _ in range(MAX_DEPTH + 1):
        values += len(level)
        if values > MAX_VALUES:
            raise ConstraintError(f"must hold at most {MAX_VALUES} values")
        level = [inner for value in level for inner in inside(value)]
        if not level:
            return
    raise ConstraintError(f"must be at most {MAX_DEPTH} levels deep")


def _rewritten(schema: Schema, root: Any, names: Sequence[str]) -> Any:
    """The schema `simplified`, and a ``oneOf`` that is plainly an ``anyOf`` written as one.

    The schemas inside it are rewritten already. ``names``: `declared_names` of the root.
    """
    if "x-guidance" in schema:  # could switch checks off
        raise ConstraintError("uses x-guidance, which is not a JSON schema keyword")
    if accepts_all(schema.get("not")):  # zod's never
        return False
    branches = as_list(schema.get("oneOf"))
    if branches and "anyOf" not in schema and exclusive([resolve(branch, root) for branch in branches]):
        schema["anyOf"] = schema.pop("oneOf")
        schema.pop("discriminator", None)  # OpenAPI's, added by pydantic: redundant
    return simplified(schema, root, names)


_COMPOSING = frozenset({"allOf", "if", "dependentSchemas", "unevaluatedProperties", "$dynamicRef"})


def _composes(schema: Schema) -> bool:
    """Whether an object's properties may be spread over several schemas, so that none of them names them all."""
    keys = schema.keys()
    return bool(_COMPOSING & keys or ("properties" in schema and {"anyOf", "oneOf", "$ref"} & keys))


def _closed(schema: Schema) -> Schema:
    """An object that declares properties or patterns, and does not mention others, allows no others.

    Outputs stay valid. Small models would go on to invent properties and never end; SGLang's and vLLM's default
    grammar backends close objects too.
    """
    if _names_properties(schema) and "additionalProperties" not in schema:
        schema["additionalProperties"] = False
        properties = schema.get("properties", {})
        if isinstance(properties, dict):  # what it only requires may be anything
            schema["properties"] = {**properties, **dict.fromkeys(required(schema) - properties.keys(), True)}
    return schema


def _names_properties(schema: Schema) -> bool:
    patterns = schema.get("patternProperties")
    allowed = isinstance(patterns, dict) and any(inner is not False for inner in patterns.values())
    return allowed or (bool(schema.get("properties")) and not patterns)
