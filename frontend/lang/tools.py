"""Tools: Python functions the model may call. A library program, written in the language itself."""

from __future__ import annotations

import enum
import inspect
import json
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .errors import ProgramError, call_site
from .expressions import assistant, gen, role
from .library import Callbacks, anywhere
from .state import AsyncState

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", dict: "object", list: "array"}
_PYTHON: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "object": (dict,),
    "array": (list,),
}

Tool = Callable[..., Any]


@dataclass(frozen=True)
class Call:
    """One call of a tool: what was asked and what came of it (``error`` is set if nothing did)."""

    name: str
    arguments: Mapping[str, Any]
    result: Any = None
    error: str | None = None

    @property
    def content(self) -> str:
        """What the model is told."""
        return json.dumps({"error": self.error} if self.error else self.result, ensure_ascii=False, default=str)


def tool_loop(s: Any, tools: Sequence[Tool], max_steps: int = 8, *, name: str = "answer", **sampling: Any) -> Any:
    """Lets the model answer, calling ``tools`` on the way; its last words become variable ``name``.

    ``tools``: functions with type hints, ``async def`` or not; the first paragraph of a docstring tells the model what
    one is for. A call that cannot be made, or fails, is told to the model as ``{"error": ...}``. Call it where the
    assistant's turn would come. Returns the calls made (to await, with an `AsyncState`). Raises `ProgramError` when the
    model still calls tools after ``max_steps`` turns.
    """
    return anywhere(s, lambda state, callbacks: _tool_loop(state, callbacks, tools, max_steps, name, sampling))


async def _tool_loop(
    s: AsyncState,
    callbacks: Callbacks,
    tools: Sequence[Tool],
    max_steps: int,
    name: str,
    sampling: Mapping[str, Any],
) -> list[Call]:
    known = {tool.__name__: tool for tool in tools}
    s.use_tools([schema_of(tool) for tool in tools])
    calls: list[Call] = []
    for _ in range(max_steps):
        s += assistant(gen(name, **sampling))
        asked = parse_calls(await s[name])
        if not asked:
            return calls
        for one in asked:
            calls.append(await _make(one, known, callbacks))
            s += role("tool", calls[-1].content)
    raise ProgramError(f"the model still calls tools after {max_steps} steps", variable=name, site=call_site())


def parse_calls(text: str) -> list[Call]:
    """The calls in an answer, in the form Hermes and Qwen models write them. A broken one has its ``error`` set."""
    calls = []
    for piece in text.split(OPEN)[1:]:
        body = piece.partition(CLOSE)[0].strip()
        try:
            asked, _ = json.JSONDecoder().raw_decode(body)
            arguments = asked.get("arguments") or {}
            if isinstance(arguments, str):
                arguments = json.loads(arguments)
            if not isinstance(arguments, dict):
                raise TypeError("arguments must be an object")
            calls.append(Call(asked["name"], arguments))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            calls.append(Call("", {}, error=f"not a tool call: {error}"))
    return calls


async def _make(call: Call, known: Mapping[str, Tool], callbacks: Callbacks) -> Call:
    if call.error:
        return call
    tool = known.get(call.name)
    if tool is None:
        return Call(call.name, call.arguments, error=f"no tool is called {call.name!r}; there are {', '.join(known)}")
    problem = _mismatch(tool, call.arguments)
    if problem:
        return Call(call.name, call.arguments, error=problem)
    try:
        return Call(call.name, call.arguments, await callbacks.call(tool, **call.arguments))
    except Exception as error:  # a tool is anybody's code: whatever it raises, the model is told
        return Call(call.name, call.arguments, error=f"{type(error).__name__}: {error}")


def schema_of(tool: Tool) -> dict[str, Any]:
    """A function as OpenAI's ``tools`` describe one. Raises TypeError for a parameter without a type we can name."""
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


def _json_type(hint: Any, where: str) -> dict[str, Any]:
    if hint is Any:
        return {}
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return {"type": _TYPES.get(type(inner[0]), "string"), "enum": list(inner)}
    if origin in (Union, types.UnionType):
        some = [one for one in inner if one is not type(None)]
        if len(some) == 1:
            return _json_type(some[0], where)
        return {"anyOf": [_json_type(one, where) for one in some]}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return {"type": "string", "enum": [member.value for member in hint]}
    if origin in (list, tuple, set, Sequence):
        return {"type": "array", "items": _json_type(inner[0], where)} if inner else {"type": "array"}
    found = _TYPES.get(origin or hint)
    if found is None:
        raise TypeError(f"{where}: no JSON type for {hint!r}")
    return {"type": found}


def _mismatch(tool: Tool, arguments: Mapping[str, Any]) -> str | None:
    """What is wrong with the arguments, in words a model can act on."""
    schema = schema_of(tool)["function"]["parameters"]
    for name in schema["required"]:
        if name not in arguments:
            return f"argument {name!r} is missing"
    for name, value in arguments.items():
        if name not in schema["properties"]:
            return f"{tool.__name__} has no argument {name!r}"
        wanted = schema["properties"][name]
        kinds = _PYTHON.get(wanted.get("type", ""), (object,))
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds and object not in kinds):
            return f"argument {name!r} must be of type {wanted['type']}, got {value!r}"
        if "enum" in wanted and value not in wanted["enum"]:
            return f"argument {name!r} must be one of {wanted['enum']}, got {value!r}"
    return None
