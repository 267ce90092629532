"""Tool definitions of a request, validated and in one form."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from ...errors import InvalidRequest, shown

_NAME = re.compile(r"[a-zA-Z0-9_-]+")


class Tool(msgspec.Struct, frozen=True):
    """A function the model may call. ``parameters`` is a JSON schema of an object."""

    name: str
    parameters: dict[str, Any]
    description: str = ""
    strict: bool = False


class ToolLimits(msgspec.Struct, frozen=True):
    """Bounds on the tools of one request. Descriptions are bounded by the request's body and the context."""

    tools: int = 128
    name_characters: int = 128
    schema_bytes: int = 65_536  # of one tool's parameters, as compact JSON
    total_bytes: int = 524_288  # of all of them
    schema_depth: int = 64  # objects and lists inside one another


class ToolReader:
    """Reads the tools of one request, one by one, in any dialect: names are unique, sizes bounded."""

    def __init__(self, limits: ToolLimits | None = None) -> None:
        self._limits = limits or ToolLimits()
        self._paths: dict[str, str] = {}  # of the tools read so far, by name
        self._bytes = 0

    def check_count(self, tools: Any, path: str = "tools") -> None:
        """Raises `InvalidRequest` unless ``tools`` is a list of at most the allowed number."""
        if not isinstance(tools, list):
            raise InvalidRequest(path, f"must be a list, got {kind_of(tools)}")
        if len(tools) > self._limits.tools:
            raise InvalidRequest(path, f"has {len(tools)} tools, more than the {self._limits.tools} allowed")

    def read(self, function: Any, path: str, within: str | None = None, schema: str = "parameters") -> Tool:
        """A function: an object with a name, a description, ``strict``, and its parameters in the field ``schema``.

        ``path`` is the tool's in the request, ``within`` the function's if that is an object inside it. Raises
        `InvalidRequest` naming the place and the limit.
        """
        within = within or path
        if not isinstance(function, Mapping):
            raise InvalidRequest(within, f"must be an object, got {kind_of(function)}")
        name = _name(function.get("name"), f"{within}.name", self._limits)
        description = function.get("description")
        if description is not None and not isinstance(description, str):
            raise InvalidRequest(f"{within}.description", f"must be a string, got {kind_of(description)}")
        strict = function.get("strict")
        if strict is not None and not isinstance(strict, bool):
            raise InvalidRequest(f"{within}.strict", f"must be true or false, got {kind_of(strict)}")
        parameters, size = _parameters(function.get(schema), f"{within}.{schema}", self._limits)
        first = self._paths.setdefault(name, path)
        if first != path:
            raise InvalidRequest(path, f"and {{0}} have the same name, {name!r}", others=(first,))
        self._bytes += size
        if self._bytes > self._limits.total_bytes:
            raise InvalidRequest(
                "tools", f"have parameters of more than the {self._limits.total_bytes} bytes allowed together"
            )
        return Tool(name, parameters, description or "", bool(strict))


def _name(name: Any, field: str, limits: ToolLimits) -> str:
    if not isinstance(name, str):
        raise InvalidRequest(field, f"must be a string, got {kind_of(name)}")
    if len(name) > limits.name_characters:
        raise InvalidRequest(field, f"has {len(name)} characters, more than the {limits.name_characters} allowed")
    if not _NAME.fullmatch(name):
        raise InvalidRequest(field, f"must be one or more of a-z, A-Z, 0-9, _ and -, got {shown(name)}")
    return name


def _parameters(schema: Any, field: str, limits: ToolLimits) -> tuple[dict[str, Any], int]:
    """The schema, and its bytes as compact JSON."""
    if schema is None or schema == {}:
        return {"type": "object", "properties": {}}, 2
    if not isinstance(schema, Mapping):
        raise InvalidRequest(field, f"must be a JSON schema, an object, got {kind_of(schema)}")
    problem = _too_much(schema, limits)
    if problem is not None:
        raise InvalidRequest(field, problem)
    try:
        size = len(json.dumps(schema, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass"))
    except (TypeError, ValueError) as error:
        raise InvalidRequest(field, f"is not a JSON value: {error}") from error
    if size > limits.schema_bytes:
        raise InvalidRequest(field, f"has {size} bytes, more than the {limits.schema_bytes} allowed")
    if schema.get("type", "object") != "object":
        raise InvalidRequest(
            f"{field}.type", f'must be "object": arguments are passed by name; got {shown(schema["type"])}'
        )
    properties = schema.get("properties", {})
    if not isinstance(properties, Mapping):
        raise InvalidRequest(f"{field}.properties", f"must be an object, got {kind_of(properties)}")
    return {"type": "object", **schema}, size


def _too_much(schema: Any, limits: ToolLimits) -> str | None:
    """The problem with a schema that is nested too deeply or certainly too large, without serialising it: a value needs
    at least two bytes, and a character one. Iterative, so a deep schema cannot exhaust Python's stack."""
    level, size = [schema], 0
    for _ in range(limits.schema_depth):
        size += 2 * sum(map(len, level))
        if size <= limits.schema_bytes:
            texts = (
                text for outer in level for text in (*outer, *(outer.values() if isinstance(outer, Mapping) else ()))
            )
            size += sum(len(text) for text in texts if isinstance(text, str))
        if size > limits.schema_bytes:
            return f"has more than the {limits.schema_bytes} bytes allowed"
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, Mapping) else outer)
            if isinstance(inner, Mapping | list)
        ]
        if not level:
            return None
    return f"is nested deeper than the {limits.schema_depth} levels allowed"


def kind_of(value: Any) -> str:
    """A value's type, in JSON's words."""
    kinds: list[tuple[type, str]] = [(bool, "a boolean"), (int, "a number"), (float, "a number"), (str, "a string")]
    kinds += [(list, "a list"), (dict, "an object"), (type(None), "nothing")]
    return next((name for kind, name in kinds if isinstance(value, kind)), type(value).__name__)
