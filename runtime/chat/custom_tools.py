"""OpenAI's custom tools, whose input is plain text: the model sees each as a function with one string parameter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec

from ..errors import InvalidRequest

_INPUT = "input"  # the parameter


def custom_function(tool: Mapping[str, Any], path: str) -> tuple[Any, str, str]:
    """A custom tool as a function: as `openai_tools` reads one."""
    nested = tool.get("custom")
    given, within = (nested, f"{path}.custom") if isinstance(nested, Mapping) else (tool, path)
    described = given.get("description")
    if described is not None and not isinstance(described, str):
        raise InvalidRequest(f"{within}.description", f"must be a string, got {type(described).__name__}")
    format = given.get("format")
    if isinstance(format, Mapping) and format.get("type") == "grammar":
        grammar = format.get("grammar", format)  # chat completions nest it
        if not isinstance(grammar, Mapping) or not isinstance(grammar.get("definition"), str):
            raise InvalidRequest(f"{within}.format.definition", "must be a grammar, a string")
        syntax = "regular expression" if grammar.get("syntax") == "regex" else "Lark grammar"
        described = f"{described or ''}\n\nThe input must match this {syntax}:\n{grammar['definition']}".lstrip()
    schema = {
        "type": "object",
        "properties": {_INPUT: {"type": "string", "description": "The tool's input, as plain text."}},
        "required": [_INPUT],
        "additionalProperties": False,
    }
    return {"name": given.get("name"), "description": described, "parameters": schema}, path, within


def custom_input(arguments: str) -> str:
    """The input of a custom tool, from the arguments that the model wrote; those themselves if they have none."""
    try:
        value = msgspec.json.decode(arguments)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        return arguments
    text = value.get(_INPUT) if isinstance(value, dict) else None
    return text if isinstance(text, str) else arguments


def custom_arguments(input: str) -> str:
    """The inverse of `custom_input`, for calls in a conversation."""
    return json.dumps({_INPUT: input}, ensure_ascii=False)
