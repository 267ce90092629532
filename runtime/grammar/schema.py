"""A JSON schema before it is compiled: parsed, bounded, and with nothing in it that could switch a check off."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import msgspec

from ..constraint import ConstraintError

MAX_DEPTH = 64  # of objects and lists inside each other
MAX_VALUES = 20_000  # objects, lists, strings and numbers in all

_MAX_COMPARED = 64  # objects compared pair by pair: more would keep the GIL from the engine's thread for seconds

# A space, or a line break and its indentation. Unbounded whitespace is a hole that small models fall into.
WHITESPACE = r" ?|\n[ \t]{0,40}"
_OPTIONS = {"lenient": False, "whitespace_pattern": WHITESPACE}
_TYPES = frozenset({"string", "number", "integer", "boolean", "null", "array", "object"})


def parse(text: str) -> Any:
    """``text`` as a schema in the form that llguidance takes. Raises `ConstraintError` that says what is wrong."""
    try:
        schema = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ConstraintError(f"is not valid JSON: {error}") from error
    if not isinstance(schema, (dict, bool)):
        raise ConstraintError(f"must be a JSON object, got {type(schema).__name__}")
    _bound(schema)
    schema = _checked(schema, schema)
    if not _composes(schema):
        schema = _closed(schema)
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


_NAMING = frozenset({"properties", "patternProperties", "$defs", "definitions"})  # their keys are the author's names
_LITERALS = frozenset({"const", "enum", "default", "examples"})  # their values are data, not schemas


def _checked(value: Any, root: Any, named: bool = False) -> Any:
    """A copy with every ``oneOf`` that is plainly an ``anyOf`` written as one: what pydantic makes of tagged unions.

    ``named``: the keys of ``value`` are names that the schema's author chose (``properties``, ``$defs``).
    """
    if isinstance(value, list):
        return [_checked(inner, root) for inner in value]
    if not isinstance(value, dict):
        return value
    if named:
        return {name: _checked(inner, root) for name, inner in value.items()}
    if "x-guidance" in value:
        raise ConstraintError("uses x-guidance, which is not a JSON schema keyword")
    result = {key: inner if key in _LITERALS else _checked(inner, root, key in _NAMING) for key, inner in value.items()}
    branches = result.get("oneOf")
    if (
        isinstance(branches, list)
        and branches
        and "anyOf" not in result
        and _exclusive([_resolve(branch, root) for branch in branches])
    ):
        result["anyOf"] = result.pop("oneOf")
        result.pop("discriminator", None)  # OpenAPI's, which pydantic adds: it says the same
    return result


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
        _composes(inner, not named and key in _NAMING) for key, inner in value.items() if named or key not in _LITERALS
    )


def _closed(value: Any, named: bool = False) -> Any:
    """A copy in which an object that names its properties, and says nothing of others, has no others.

    What an output is then is valid all the same. Without it small models never end: they go on to invent properties.
    SGLang's and vLLM's default grammars do likewise.
    """
    if isinstance(value, list):
        return [_closed(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    result = {
        key: inner if not named and key in _LITERALS else _closed(inner, not named and key in _NAMING)
        for key, inner in value.items()
    }
    if not named and result.get("properties") and not {"additionalProperties", "patternProperties"} & result.keys():
        result["additionalProperties"] = False
    return result


def _resolve(schema: Any, root: Any) -> Any:
    for _ in range(8):
        reference = schema.get("$ref") if isinstance(schema, dict) else None
        if not isinstance(reference, str) or not reference.startswith("#/"):
            break
        schema = root
        for part in reference[2:].split("/"):
            name = part.replace("~1", "/").replace("~0", "~")
            schema = schema.get(name) if isinstance(schema, dict) else None
    return schema


def _exclusive(branches: list[Any]) -> bool:
    """Is it certain, at a glance, that no value satisfies two of these?"""
    taken: set[str] = set()
    objects: list[dict[str, Any]] = []
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
    shared = frozenset.intersection(*map(_required, objects)) if objects else frozenset()
    for name in shared:  # a tag that all of them have: no need to look at pairs
        tags = [_tags(branch, name) for branch in objects]
        if all(tags) and sum(map(len, tags)) == len(frozenset().union(*tags)):
            return True
    return len(objects) <= _MAX_COMPARED and all(_tagged_apart(a, b) for a, b in combinations(objects, 2))


def _tagged_apart(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Do two kinds of objects have a required property that cannot be the same string?"""
    shared = _required(a) & _required(b)
    return any(_tags(a, name) and _tags(b, name) and not _tags(a, name) & _tags(b, name) for name in shared)


def _types(schema: dict[str, Any]) -> frozenset[str]:
    given = schema.get("type", list(_TYPES))
    types = frozenset([given] if isinstance(given, str) else [one for one in given if isinstance(one, str)])
    return types | {"integer"} if "number" in types else types


def _required(schema: dict[str, Any]) -> frozenset[str]:
    names = schema.get("required")
    return frozenset(name for name in names if isinstance(name, str)) if isinstance(names, list) else frozenset()


def _tags(schema: dict[str, Any], name: str) -> frozenset[str]:
    """The strings a property may be, if it is a closed list of them."""
    properties = schema.get("properties")
    tag = properties.get(name) if isinstance(properties, dict) else None
    if not isinstance(tag, dict):
        return frozenset()
    values = [tag["const"]] if "const" in tag else tag.get("enum")
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        return frozenset()
    return frozenset(values)
