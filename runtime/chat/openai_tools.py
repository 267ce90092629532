"""OpenAI's tools, of chat completions and of responses, with the definitions that a template is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .conversation import OfferedTool
from .openai_messages import read_breakpoint
from .tools.definitions import ToolLimits, ToolReader, function_of

_NOT_FOR_THE_MODEL = ("type", "strict", "prompt_cache_breakpoint", "cache_control")
_FIELDS = ("name", "description", "parameters")  # of a function in the responses API


def openai_tools(
    tools: Sequence[Any] | None, limits: ToolLimits | None = None, *, flat: bool = False
) -> list[OfferedTool]:
    """Takes functions as objects of their own, ``{"type": "function", "function": {...}}``, and as the responses API
    has them (``flat``: only so), ``{"type": "function", "name": ...}``. Raises `InvalidRequest` naming the tool."""
    if tools is None:
        return []
    reader = ToolReader(limits)
    reader.check_count(tools)
    found = []
    for i, given in enumerate(tools):
        function, path, within = function_of(given, f"tools[{i}]", flat=flat)
        tool = reader.read(function, path, within)
        if within == path:
            shown = {name: function[name] for name in _FIELDS if function.get(name) is not None}
        else:
            shown = {name: value for name, value in function.items() if name not in _NOT_FOR_THE_MODEL}
        definition = {"type": "function", "function": shown}
        found.append(OfferedTool(tool, definition, f"{within}.parameters", read_breakpoint(given, path)))
    return found
