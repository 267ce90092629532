"""Untyped values as JSON of the type that a tool's schema declares."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from .definitions import Tool
from .json_values import escape, is_json
from .reader import Malformed, Reader
from .values import JSON_NUMBER, value

STRING = frozenset({"string"})
_ALL_BUT_STRING = frozenset({"null", "boolean", "integer", "number", "array", "object"})
# Names that are not JSON schema's, which tools written for other languages use.
_ALIASES = {
    **dict.fromkeys(("float", "double", "decimal", "num"), "number"),
    **dict.fromkeys(("int", "long", "uint"), "integer"),
    **dict.fromkeys(("dict", "map"), "object"),
    **dict.fromkeys(("list", "arr", "tuple", "set"), "array"),
    **dict.fromkeys(("str", "text"), "string"),
    "bool": "boolean",
}
_REFERENCES = 16  # $ref followed at most, one after the other
_BRANCHES = 64  # of anyOf, oneOf and allOf looked into at most


def parameter_types(tool: Tool | None, key: str) -> frozenset[str]:
    """The JSON types that the schema allows for a parameter; "string" if it names none."""
    if tool is None:
        return STRING
    properties = tool.parameters.get("properties")
    schema = properties.get(key) if isinstance(properties, Mapping) else None
    return frozenset(_types(schema, tool.parameters)) or STRING


def declared_types(types: frozenset[str], string: bool) -> frozenset[str]:
    """``types``, of a parameter's schema, less those that the model declares the value not to have: it is a string, or
    it is not. A declared string stays of the schema's types if these have no strings."""
    if string:
        return STRING if "string" in types else types
    return (types - STRING) or _ALL_BUT_STRING


def _types(schema: Any, root: Mapping[str, Any]) -> Iterator[str]:
    pending, looked = [(schema, 0)], 0
    while pending and looked < _BRANCHES:
        schema, references = pending.pop()
        looked += 1
        if not isinstance(schema, Mapping):
            continue
        types = schema.get("type")
        if isinstance(types, str | list):
            names = [types] if isinstance(types, str) else types
            yield from (_ALIASES.get(name.lower(), name) for name in names if isinstance(name, str))
        elif isinstance(schema.get("enum"), list):
            yield from {_type_of(value) for value in schema["enum"]}
        elif "const" in schema:
            yield _type_of(schema["const"])
        elif isinstance(schema.get("$ref"), str) and references < _REFERENCES:
            pending.append((_resolve(schema["$ref"], root), references + 1))
        for name in ("anyOf", "oneOf", "allOf"):
            branches = schema.get(name)
            if isinstance(branches, list):
                pending.extend((branch, references) for branch in branches[:_BRANCHES])


def _type_of(value: Any) -> str:
    if value is None:
        return "null"
    kinds: list[tuple[type, str]] = [(bool, "boolean"), (int, "integer"), (float, "number"), (str, "string")]
    return next(
        (name for kind, name in kinds if isinstance(value, kind)), "array" if isinstance(value, list) else "object"
    )


def _resolve(reference: str, root: Mapping[str, Any]) -> Any:
    """The target of a reference into the same schema, such as ``#/$defs/name``; None if there is none."""
    found: Any = root
    for part in reference.removeprefix("#").split("/")[1:]:
        if not isinstance(found, Mapping):
            return None
        found = found.get(part.replace("~1", "/").replace("~0", "~"))
    return found if reference.startswith("#") else None


def typed(text: str, types: frozenset[str]) -> str:
    """``text`` as JSON of one of ``types``: unchanged if it is already; a string if it is of none of them.

    A JSON string whose content is of one of ``types`` is taken for a value encoded twice.
    """
    bare = text.strip()
    if bare[:1] == '"' and "string" not in types and is_json(bare):
        content = json.loads(bare)
        if not content.lstrip().startswith('"'):
            inner = typed(content, types)
            return inner if inner[0] != '"' else f'"{escape(text)}"'
    if bare in ("null", "None"):
        return "null"
    if "boolean" in types and bare.lower() in ("true", "false"):
        return bare.lower()
    if types & {"integer", "number"}:
        number = bare.removeprefix("+")
        if JSON_NUMBER.fullmatch(number):
            return number
    if types & {"object", "array"} and bare[:1] in ("{", "["):
        if is_json(bare):
            return bare
        converted = _from_python(bare)
        if converted is not None:
            return converted
    return f'"{escape(text)}"'


def _from_python(text: str) -> str | None:
    """A Python literal as JSON; None if ``text`` is not one."""
    reader = Reader()
    reader.push(text)
    reader.ended = True
    pieces: list[str] = []
    try:
        for _ in value(reader, pieces.append, json=True):
            pass
    except Malformed:
        return None
    return "".join(pieces) if reader.at == len(text) else None
