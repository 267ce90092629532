"""OpenAI's tools, of chat completions and of responses, with the definitions that a template is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InvalidRequest, shown
from .conversation import OfferedTool
from .custom_tools import custom_function
from .openai_messages import label, namespaced, read_breakpoint
from .tools.definitions import ToolLimits, ToolReader, kind_of

_NOT_FOR_THE_MODEL = ("type", "strict", "prompt_cache_breakpoint", "cache_control")
_FIELDS = ("name", "description", "parameters")  # of a function in the responses API


def openai_tools(
    tools: Sequence[Any] | None,
    limits: ToolLimits | None = None,
    *,
    flat: bool = False,
    left_out: list[str] | None = None,
) -> list[OfferedTool]:
    """Functions, custom tools, and those inside namespaces, as the model is offered them.

    A function is an object of its own, ``{"type": "function", "function": {...}}``, or, as in the responses API
    (``flat``: only so), ``{"type": "function", "name": ...}``. A custom tool becomes a function of one text; a
    namespace's tools are named ``namespace__name``. ``defer_loading`` loads at once. Tools that run on OpenAI's servers
    (web search and the like) are appended to ``left_out`` as ``path type``; None refuses them. Raises `InvalidRequest`
    naming the tool.
    """
    if tools is None:
        return []
    reader = _Reader(limits, flat)
    reader.tools.check_count(tools)
    for i, tool in enumerate(tools):
        path, kind = f"tools[{i}]", tool.get("type") if isinstance(tool, Mapping) else None
        if kind == "namespace":
            reader.read_namespace(tool, path)
        elif left_out is not None and isinstance(kind, str) and not _is_function(tool, kind):
            left_out.append(f"{path} {kind[:60]}")
        else:
            reader.read(tool, path)
    return reader.found


def _is_function(tool: Mapping[str, Any], kind: str) -> bool:
    """Whether it is one of ours, or a function whose type is misspelt."""
    return kind in ("function", "custom") or "function" in tool or "parameters" in tool


class _Reader:
    def __init__(self, limits: ToolLimits | None, flat: bool) -> None:
        self.tools = ToolReader(limits)
        self.found: list[OfferedTool] = []
        self._flat = flat

    def read_namespace(self, tool: Mapping[str, Any], path: str) -> None:
        namespace = label(tool.get("name"), f"{path}.name")
        self.tools.check_count(tool.get("tools"), f"{path}.tools")
        for i, inner in enumerate(tool["tools"]):
            self.read(inner, f"{path}.tools[{i}]", namespace)

    def read(self, tool: Any, path: str, namespace: str | None = None) -> None:
        custom = isinstance(tool, Mapping) and tool.get("type") == "custom"
        function, path, within = custom_function(tool, path) if custom else _function(tool, path, flat=self._flat)
        if tool.get("async"):
            raise InvalidRequest(f"{path}.async", "is not supported by this server")
        name = function.get("name") if isinstance(function, Mapping) else None
        if namespace is not None and isinstance(name, str):
            function = {**function, "name": namespaced(namespace, name)}
        read = self.tools.read(function, path, within)
        if within == path:
            visible = {name: function[name] for name in _FIELDS if function.get(name) is not None}
        else:
            visible = {name: value for name, value in function.items() if name not in _NOT_FOR_THE_MODEL}
        offered = OfferedTool(
            read,
            {"type": "function", "function": visible},
            f"{within}.parameters",
            read_breakpoint(tool, path),
            custom=custom,
            name=name or "",
            namespace=namespace,
        )
        self.found.append(offered)


def _function(tool: Any, path: str, *, flat: bool = False) -> tuple[Any, str, str]:
    """Arguments of `ToolReader.read` for a tool: its function, its path and the function's path.

    ``flat``: the tool is the function, as in the responses API; otherwise it may be.
    """
    if not isinstance(tool, Mapping):
        raise InvalidRequest(path, f"must be an object, got {kind_of(tool)}")
    if tool.get("type") != "function":
        problem = f'must be "function", the only kind of tool this server has, got {shown(tool.get("type"))}'
        raise InvalidRequest(f"{path}.type", problem)
    if not flat and ("function" in tool or "name" not in tool):
        return tool.get("function"), path, f"{path}.function"
    return tool, path, path
