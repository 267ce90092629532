"""A JSON schema before it is compiled: parsed, bounded, and rewritten for llguidance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from ..constraint import ConstraintError
from .finite_schema import without_endless
from .keywords import LITERALS, NAMED_SCHEMAS, accepts_all, check, declared_names, resolve, simplified
from .unions import exclusive

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
    if not _composes(schema):
        schema = _closed(schema)
    written, schema = schema, _rewritten(schema, schema, declared_names(schema))
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
        level = [inner for value in level for inner in _inside(value)]
        if not level:
            return
    raise ConstraintError(f"must be at most {MAX_DEPTH} levels deep")


def _inside(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _rewritten(value: Any, root: Any, names: Sequence[str], named: bool = False) -> Any:
    """A copy in which each schema is `simplified`, and a ``oneOf`` that is plainly an ``anyOf`` is written as one.

    ``names``: `declared_names` of the root. ``named``: the keys of ``value`` are names that the schema's author chose
    (``properties``, ``$defs``).
    """
    if isinstance(value, list):
        return [_rewritten(inner, root, names) for inner in value]
    if not isinstance(value, dict):
        return value
    if named:
        return {name: _rewritten(inner, root, names) for name, inner in value.items()}
    if "x-guidance" in value:  # could switch checks off
        raise ConstraintError("uses x-guidance, which is not a JSON schema keyword")
    result = {
        key: inner if key in LITERALS else _rewritten(inner, root, names, key in NAMED_SCHEMAS)
        for key, inner in value.items()
    }
    if accepts_all(result.get("not")):  # zod's never
        return False
    branches = result.get("oneOf")
    if (
        isinstance(branches, list)
        and branches
        and "anyOf" not in result
        and exclusive([resolve(branch, root) for branch in branches])
    ):
        result["anyOf"] = result.pop("oneOf")
        result.pop("discriminator", None)  # OpenAPI's, which pydantic adds, says the same
    return simplified(result, root, names)


_COMPOSING = frozenset({"allOf", "if", "dependentSchemas", "unevaluatedProperties", "$dynamicRef"})


def _composes(value: Any, named: bool = False) -> bool:
    """Whether an object's properties may be spread over several schemas, so that none of them names them all."""
    if isinstance(value, list):
        return any(_composes(inner) for inner in value)
    if not isinstance(value, dict):
        return False
    if not named and (
        _COMPOSING & value.keys() or ("properties" in value and {"anyOf", "oneOf", "$ref"} & value.keys())
    ):
        return True
    return any(
        _composes(inner, not named and key in NAMED_SCHEMAS)
        for key, inner in value.items()
        if named or key not in LITERALS
    )


def _closed(value: Any, named: bool = False) -> Any:
    """A copy in which an object that declares properties or patterns, and does not mention others, allows no others.

    Outputs stay valid. Small models would go on to invent properties and never end; SGLang's and vLLM's default
    grammar backends close objects too.
    """
    if isinstance(value, list):
        return [_closed(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    result = {
        key: inner if not named and key in LITERALS else _closed(inner, not named and key in NAMED_SCHEMAS)
        for key, inner in value.items()
    }
    if not named and _names_properties(result) and "additionalProperties" not in result:
        result["additionalProperties"] = False
        required, properties = result.get("required"), result.get("properties", {})
        if isinstance(required, list) and isinstance(properties, dict):  # what it only requires may be anything
            undeclared = {name: True for name in required if isinstance(name, str) and name not in properties}
            result["properties"] = {**properties, **undeclared}
    return result


def _names_properties(schema: dict[str, Any]) -> bool:
    patterns = schema.get("patternProperties")
    allowed = isinstance(patterns, dict) and any(inner is not False for inner in patterns.values())
    return allowed or (bool(schema.get("properties")) and not patterns)
