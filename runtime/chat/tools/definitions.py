"""Tool definitions of a request, checked and brought into one shape."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping
from typing import Any

import msgspec

from ...errors import InvalidRequest

_NAME = re.compile(r"[a-zA-Z0-9_-]+")
_repr = reprlib.Repr()  # looks at a few elements only
_repr.maxstring = 80


class Tool(msgspec.Struct, frozen=True):
    """A function the model may call. ``parameters`` is a JSON schema of an object."""

    name: str
    parameters: dict[str, Any]
    description: str = ""
    strict: bool = False

    def definition(self) -> dict[str, Any]:
        """As chat templates take it: the shape of the chat completions API."""
        function: dict[str, Any] = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}


class ToolLimits(msgspec.Struct, frozen=True):
    """Bounds on the tools of one request."""

    tools: int = 128
    name_characters: int = 64
    description_characters: int = 16_384
    schema_bytes: int = 65_536  # of one tool's parameters, as compact JSON
    total_bytes: int = 524_288  # of all of them
    schema_depth: int = 64  # objects and lists inside one another


def validate_tools(tools: Any, limits: ToolLimits | None = None) -> list[Tool]:
    """The tools of a request, in order; ``tools`` is the JSON value of its field, None if there was none.

    Takes the shape of the chat completions API (``{"type": "function", "function": {...}}``) and that of the
    responses API (``{"type": "function", "name": ...}``). Raises `InvalidRequest` naming the place and the limit.
    """
    limits = limits or ToolLimits()
    if tools is None:
        return []
    if not isinstance(tools, list):
        raise InvalidRequest(f"tools must be a list, got {_kind(tools)}", field="tools")
    if len(tools) > limits.tools:
        raise InvalidRequest(f"tools has {len(tools)} tools, more than the {limits.tools} allowed", field="tools")
    checked: list[Tool] = []
    places: dict[str, int] = {}
    total = 0
    for i, tool in enumerate(tools):
        found, size = _tool(tool, f"tools[{i}]", limits)
        first = places.setdefault(found.name, i)
        if first != i:
            raise InvalidRequest(f"tools[{i}] and tools[{first}] have the same name, {found.name!r}", field="tools")
        total += size
        if total > limits.total_bytes:
            raise InvalidRequest(
                f"the parameters of tools have more than the {limits.total_bytes} bytes allowed together", field="tools"
            )
        checked.append(found)
    return checked


def _tool(tool: Any, field: str, limits: ToolLimits) -> tuple[Tool, int]:
    """The tool, and the bytes of its schema."""
    if not isinstance(tool, Mapping):
        raise InvalidRequest(f"{field} must be an object, got {_kind(tool)}", field=field)
    kind = tool.get("type")
    if kind != "function":
        raise InvalidRequest(
            f'{field}.type must be "function", the only kind of tool this server has, got {_shown(kind)}',
            field=f"{field}.type",
        )
    function: Any = tool
    if "function" in tool or "name" not in tool:
        field = f"{field}.function"
        function = tool.get("function")
        if not isinstance(function, Mapping):
            raise InvalidRequest(f"{field} must be an object, got {_kind(function)}", field=field)
    name = _name(function.get("name"), f"{field}.name", limits)
    description = function.get("description")
    if description is not None and not isinstance(description, str):
        raise InvalidRequest(
            f"{field}.description must be a string, got {_kind(description)}", field=f"{field}.description"
        )
    if description and len(description) > limits.description_characters:
        raise InvalidRequest(
            f"{field}.description has {len(description)} characters, "
            f"more than the {limits.description_characters} allowed",
            field=f"{field}.description",
        )
    strict = function.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise InvalidRequest(f"{field}.strict must be true or false, got {_kind(strict)}", field=f"{field}.strict")
    parameters, size = _parameters(function.get("parameters"), f"{field}.parameters", limits)
    return Tool(name, parameters, description or "", bool(strict)), size


def _name(name: Any, field: str, limits: ToolLimits) -> str:
    if not isinstance(name, str):
        raise InvalidRequest(f"{field} must be a string, got {_kind(name)}", field=field)
    if len(name) > limits.name_characters:
        raise InvalidRequest(
            f"{field} has {len(name)} characters, more than the {limits.name_characters} allowed", field=field
        )
    if not _NAME.fullmatch(name):
        raise InvalidRequest(f"{field} must be one or more of a-z, A-Z, 0-9, _ and -, got {_shown(name)}", field=field)
    return name


def _parameters(schema: Any, field: str, limits: ToolLimits) -> tuple[dict[str, Any], int]:
    if schema is None or schema == {}:
        return {"type": "object", "properties": {}}, 2
    if not isinstance(schema, Mapping):
        raise InvalidRequest(f"{field} must be a JSON schema, an object, got {_kind(schema)}", field=field)
    problem = _too_much(schema, limits)
    if problem is not None:
        raise InvalidRequest(f"{field} {problem}", field=field)
    try:
        size = len(json.dumps(schema, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass"))
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"{field} is not a JSON value: {error}", field=field) from error
    if size > limits.schema_bytes:
        raise InvalidRequest(f"{field} has {size} bytes, more than the {limits.schema_bytes} allowed", field=field)
    if schema.get("type", "object") != "object":
        raise InvalidRequest(
            f'{field}.type must be "object": arguments are passed by name; got {_shown(schema["type"])}',
            field=f"{field}.type",
        )
    properties = schema.get("properties", {})
    if not isinstance(properties, Mapping):
        raise InvalidRequest(
            f"{field}.properties must be an object, got {_kind(properties)}", field=f"{field}.properties"
        )
    return {"type": "object", **schema}, size


def _too_much(schema: Any, limits: ToolLimits) -> str | None:
    """Whether objects and lists stand too deep in one another, or hold more than the bytes allowed can spell, at two
    for each value and one for each character: megabytes are not written out to be measured. Needs no stack of
    Python's."""
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


def _kind(value: Any) -> str:
    """A value's type, in JSON's words."""
    kinds: list[tuple[type, str]] = [(bool, "a boolean"), (int, "a number"), (float, "a number"), (str, "a string")]
    kinds += [(list, "a list"), (dict, "an object"), (type(None), "nothing")]
    return next((name for kind, name in kinds if isinstance(value, kind)), type(value).__name__)


def _shown(value: Any) -> str:
    text = _repr.repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
