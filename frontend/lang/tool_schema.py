"""Python functions as tools: the schema that describes one to the model, and the check of a call's arguments."""

from __future__ import annotations

import enum
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

Tool = Callable[..., Any]

_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", dict: "object", list: "array"}
_PYTHON: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "object": (dict,),
    "array": (list,),
}


def schema_of(tool: Tool) -> dict[str, Any]:
    """The function in the form of OpenAI's ``tools``. Raises TypeError for a type that JSON cannot express."""
    hints = get_type_hints(tool)
    properties, required = {}, []
    for parameter in inspect.signature(tool).parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise TypeError(f"{tool.__name__}: a tool's parameters must have names, {parameter} has none")
        if parameter.name not in hints:
            raise TypeError(f"{tool.__name__}: parameter {parameter.name!r} needs a type hint")
        properties[parameter.name] = _json_type(hints[parameter.name], f"{tool.__name__}: {parameter.name}")
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    about = (inspect.getdoc(tool) or tool.__name__).partition("\n\n")[0].replace("\n", " ")
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": tool.__name__, "description": about, "parameters": parameters}}


def fitted(tool: Tool, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as the function takes them. Raises ValueError with a reason that the model can act on."""
    parameters = schema_of(tool)["function"]["parameters"]
    for name in parameters["required"]:
        if name not in arguments:
            raise ValueError(f"argument {name!r} is missing")
    hints = get_type_hints(tool)
    for name, value in arguments.items():
        if name not in parameters["properties"]:
            raise ValueError(f"{tool.__name__} has no argument {name!r}")
        expected = parameters["properties"][name]
        kinds = _PYTHON.get(expected.get("type", ""), (object,))
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds and object not in kinds):
            raise ValueError(f"argument {name!r} must be of type {expected['type']}, got {value!r}")
        if "enum" in expected and value not in expected["enum"]:
            raise ValueError(f"argument {name!r} must be one of {expected['enum']}, got {value!r}")
    return {name: _member(hints[name], value) for name, value in arguments.items()}


def _json_type(hint: Any, where: str) -> dict[str, Any]:
    if hint is Any:
        return {}
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return _one_of(list(inner))
    if origin in (Union, types.UnionType):
        some = [one for one in inner if one is not type(None)]
        if len(some) == 1:
            return _json_type(some[0], where)
        return {"anyOf": [_json_type(one, where) for one in some]}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _one_of([member.value for member in hint])
    if origin in (list, tuple, set, Sequence):
        return {"type": "array", "items": _json_type(inner[0], where)} if inner else {"type": "array"}
    found = _TYPES.get(origin or hint)
    if found is None:
        raise TypeError(f"{where}: no JSON type for {hint!r}")
    return {"type": found}


def _one_of(values: list[Any]) -> dict[str, Any]:
    kinds = {_TYPES.get(type(value)) for value in values}
    return {"type": kinds.pop(), "enum": values} if len(kinds) == 1 and None not in kinds else {"enum": values}


def _member(hint: Any, value: Any) -> Any:
    """The enum member with this value, if the hint is an enum; any other value unchanged."""
    for one in (hint, *get_args(hint)):
        if isinstance(one, type) and issubclass(one, enum.Enum) and value in [member.value for member in one]:
            return one(value)
    return value
