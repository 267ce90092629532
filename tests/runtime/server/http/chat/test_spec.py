"""``tool_choice`` in all of OpenAI's shapes."""

from __future__ import annotations

from typing import Any

import pytest

from branchwise.runtime.chat.openai_tools import openai_tools
from branchwise.runtime.errors import InvalidRequest
from branchwise.runtime.server.http.chat.spec import ToolChoice, openai_tool_choice

F = {"type": "function", "name": "f", "parameters": {"type": "object"}}
TOOLS = openai_tools(
    [F, {"type": "custom", "name": "c"}, {"type": "namespace", "name": "n", "tools": [{**F, "name": "g"}]}]
)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, ToolChoice("auto")),
        ("none", ToolChoice("none")),
        ("required", ToolChoice("required")),
        ({"type": "function", "name": "f"}, ToolChoice("required", ("f",))),
        ({"type": "function", "function": {"name": "f"}}, ToolChoice("required", ("f",))),
        ({"type": "custom", "name": "c"}, ToolChoice("required", ("c",))),
        ({"type": "custom", "custom": {"name": "c"}}, ToolChoice("required", ("c",))),
        ({"type": "function", "name": "g", "namespace": "n"}, ToolChoice("required", ("n__g",))),
        ({"type": "function", "name": "n__g"}, ToolChoice("required", ("n__g",))),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
            ToolChoice("auto", ("f",)),
        ),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "g"}}]},
            },
            ToolChoice("required", ("n__g",)),
        ),
    ],
)
def test_what_is_chosen(choice: Any, expected: ToolChoice) -> None:
    assert openai_tool_choice(choice, TOOLS) == expected


@pytest.mark.parametrize(
    ("choice", "path"),
    [
        ("all", "tool_choice"),
        ({"type": "web_search"}, "tool_choice.type"),
        ({}, "tool_choice.type"),
        ({"type": "function"}, "tool_choice.name"),
        ({"type": "function", "function": {}}, "tool_choice.function.name"),
        ({"type": "function", "name": "h"}, "tool_choice"),
        ({"type": "function", "name": "g", "namespace": "m"}, "tool_choice"),
        ({"type": "allowed_tools"}, "tool_choice.tools"),
        ({"type": "allowed_tools", "mode": "none", "tools": [F]}, "tool_choice.mode"),
        ({"type": "allowed_tools", "allowed_tools": 7}, "tool_choice.allowed_tools"),
        ({"type": "allowed_tools", "tools": [7]}, "tool_choice.tools[0].type"),
        ({"type": "allowed_tools", "tools": [F, {**F, "name": "h"}]}, "tool_choice.tools[1]"),
    ],
)
def test_what_is_refused(choice: Any, path: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        openai_tool_choice(choice, TOOLS)
    assert refused.value.path == path
