"""Tools of every kind that clients send: what the model is offered, and what is left out."""

from __future__ import annotations

import json
from typing import Any

import pytest

from branchwise.runtime.chat.conversation import CallPart
from branchwise.runtime.chat.custom_tools import custom_arguments, custom_input
from branchwise.runtime.chat.openai_messages import openai_turns
from branchwise.runtime.chat.openai_tools import openai_tools
from branchwise.runtime.errors import InvalidRequest

FUNCTION = {"type": "function", "name": "run", "description": "Run.", "parameters": {"type": "object"}, "strict": False}
CUSTOM = {"type": "custom", "name": "apply_patch", "description": "Patch files."}
NAMESPACE = {"type": "namespace", "name": "mcp__files__", "description": "Files.", "tools": [FUNCTION, CUSTOM]}
HOSTED = [
    {"type": "web_search", "external_web_access": False},
    {"type": "local_shell"},
    {"type": "image_generation", "output_format": "png"},
    {"type": "tool_search"},
    {"type": "mcp", "server_label": "x", "server_url": "http://169.254.1.1"},
]


def test_tools_that_run_elsewhere_are_left_out_and_said() -> None:
    left_out: list[str] = []
    found = openai_tools([HOSTED[0], FUNCTION, *HOSTED[1:]], flat=True, left_out=left_out)
    assert [offered.tool.name for offered in found] == ["run"]
    assert left_out == [
        "tools[0] web_search",
        "tools[2] local_shell",
        "tools[3] image_generation",
        "tools[4] tool_search",
        "tools[5] mcp",
    ]
    for tool in HOSTED:  # in process nobody would hear of it
        with pytest.raises(InvalidRequest, match=r"tools\[0\].type must be"):
            openai_tools([tool])


def test_a_namespaces_tools_are_offered_by_their_full_names() -> None:
    found = openai_tools([FUNCTION, NAMESPACE, {**NAMESPACE, "name": "docs"}], flat=True)
    names = [(offered.tool.name, offered.name, offered.namespace, offered.custom) for offered in found]
    assert names == [
        ("run", "run", None, False),
        ("mcp__files__run", "run", "mcp__files__", False),
        ("mcp__files__apply_patch", "apply_patch", "mcp__files__", True),
        ("docs__run", "run", "docs", False),
        ("docs__apply_patch", "apply_patch", "docs", True),
    ]
    assert found[1].definition["function"]["name"] == "mcp__files__run"


@pytest.mark.parametrize("nested", [False, True])
def test_a_custom_tool_is_a_function_of_one_text(nested: bool) -> None:
    grammar: dict[str, Any] = {"syntax": "lark", "definition": 'start: "x"'}
    format = {"type": "grammar", "grammar": grammar} if nested else {"type": "grammar", **grammar}
    given = {"name": "patch", "description": "Patch.", "format": format}
    [offered] = openai_tools([{"type": "custom", "custom": given} if nested else {"type": "custom", **given}])
    function = offered.definition["function"]
    assert function["name"] == offered.tool.name == "patch" and offered.custom
    assert function["description"] == 'Patch.\n\nThe input must match this Lark grammar:\nstart: "x"'
    assert function["parameters"]["required"] == ["input"]
    assert function["parameters"]["properties"]["input"]["type"] == "string"


def test_deferred_tools_are_loaded_at_once() -> None:
    [offered] = openai_tools([{**FUNCTION, "defer_loading": True}], flat=True)
    assert offered.definition["function"].keys() == {"name", "description", "parameters"}


@pytest.mark.parametrize("text", ["", "*** Begin\n+é\n", '{"input": 1}', '"quoted" \\ 😀'])
def test_a_custom_tools_input_survives(text: str) -> None:
    assert custom_input(custom_arguments(text)) == text


@pytest.mark.parametrize("arguments", ['{"input": "half', "not JSON", "[]", '{"input": 1}', '{"other": "x"}'])
def test_arguments_without_an_input_are_passed_on(arguments: str) -> None:
    assert custom_input(arguments) == arguments


def test_calls_of_custom_tools_in_a_conversation() -> None:
    call = {"id": "c", "type": "custom", "custom": {"name": "patch", "input": 'say "x"'}}
    [_, said] = openai_turns([{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}])
    assert said.calls == [CallPart("patch", json.dumps({"input": 'say "x"'}), "c", "messages[1].tool_calls[0].custom")]


@pytest.mark.parametrize(
    ("tool", "path"),
    [
        ({**NAMESPACE, "name": None}, "tools[0].name"),
        ({**NAMESPACE, "tools": None}, "tools[0].tools"),
        ({**NAMESPACE, "tools": [HOSTED[0]]}, "tools[0].tools[0].type"),
        ({**NAMESPACE, "tools": [{**FUNCTION, "name": "a b"}]}, "tools[0].tools[0].name"),
        ({**NAMESPACE, "name": "n" * 126}, "tools[0].tools[0].name"),
        ({**CUSTOM, "name": None}, "tools[0].name"),
        ({**CUSTOM, "description": 7}, "tools[0].description"),
        ({**CUSTOM, "format": {"type": "grammar", "definition": 7}}, "tools[0].format.definition"),
        ({**FUNCTION, "type": "functions"}, "tools[0].type"),
        ({**FUNCTION, "async": True}, "tools[0].async"),
    ],
)
def test_what_is_refused(tool: Any, path: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        openai_tools([tool], flat=True, left_out=[])
    assert refused.value.path == path
