"""Tool definitions: what is taken, and what each refusal says."""

from __future__ import annotations

from typing import Any

import pytest

from branchwise.runtime.chat.openai_tools import openai_tools
from branchwise.runtime.chat.tools.definitions import Tool, ToolLimits
from branchwise.runtime.errors import InvalidRequest

LIMITS = ToolLimits(tools=3, name_characters=8, schema_bytes=200, total_bytes=300, schema_depth=5)


def validated(tools: Any, limits: ToolLimits | None = None) -> list[Tool]:
    return [offered.tool for offered in openai_tools(tools, limits)]


def function(name: Any = "f", **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth - 1):
        schema = {"not": schema}
    return schema


def test_what_is_taken() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    tools = validated(
        [
            function("get-it_2", description="Gets it.", parameters=schema, strict=True, other=1),
            function("g", description=None, parameters=None, strict=None),
            {"type": "function", "name": "h", "parameters": {"properties": {}}},
        ]
    )
    empty = {"type": "object", "properties": {}}
    assert tools == [Tool("get-it_2", schema, "Gets it.", True), Tool("g", empty), Tool("h", empty)]
    assert validated(None) == validated([]) == []


def test_at_the_limits() -> None:
    text = "x" * (200 - len('{"title":""}'))
    assert validated([function("a" * 8, description="x" * 20_000, parameters={"title": text})], LIMITS)
    assert validated([function(name) for name in "abc"], LIMITS)
    assert validated([function(parameters=nested(5))], LIMITS)


@pytest.mark.parametrize(
    ("tools", "field", "message"),
    [
        ({}, "tools", "tools must be a list, got an object"),
        ("f", "tools", "must be a list, got a string"),
        ([function(name) for name in "abcd"], "tools", "has 4 tools, more than the 3 allowed"),
        ([1], "tools[0]", r"tools\[0\] must be an object, got a number"),
        ([None], "tools[0]", "got nothing"),
        ([{}], "tools[0].type", 'must be "function".*got None'),
        ([{"type": "web_search"}], "tools[0].type", "got 'web_search'"),
        ([{"type": {"x": "y" * 1000}}], "tools[0].type", r"got .{40,60}$"),
        ([{"type": "function"}], "tools[0].function", "must be an object, got nothing"),
        ([{"type": "function", "function": []}], "tools[0].function", "got a list"),
        ([function(None)], "tools[0].function.name", "must be a string, got nothing"),
        ([function(True)], "tools[0].function.name", "got a boolean"),
        ([function("")], "tools[0].function.name", "one or more of a-z"),
        ([function("a b")], "tools[0].function.name", "got 'a b'"),
        ([function("a\n")], "tools[0].function.name", "one or more of a-z"),
        ([function("é")], "tools[0].function.name", "one or more of a-z"),
        ([function("a" * 9)], "tools[0].function.name", "has 9 characters, more than the 8 allowed"),
        ([{"type": "function", "name": 1.5}], "tools[0].name", "must be a string, got a number"),
        ([function(), function("g"), function()], "tools[2]", r"tools\[2\] and tools\[0\] have the same name, 'f'"),
        ([function(description=1)], "tools[0].function.description", "must be a string"),
        ([function(strict="yes")], "tools[0].function.strict", "must be true or false, got a string"),
        ([function(parameters=[])], "tools[0].function.parameters", "an object, got a list"),
        ([function(parameters=nested(6))], "tools[0].function.parameters", "deeper than the 5 levels"),
        ([function(parameters=nested(100_000))], "tools[0].function.parameters", "deeper than the 5 levels"),
        ([function(parameters={"a": "é" * 100})], "tools[0].function.parameters", "has 208 bytes, more than the 200"),
        ([function(parameters={"a": [7] * 101})], "tools[0].function.parameters", "has more than the 200 bytes"),
        ([function(parameters={"a": {1, 2}})], "tools[0].function.parameters", "not a JSON value"),
        ([function(n, parameters={"a": "x" * 150}) for n in "ab"], "tools", "more than the 300 bytes allowed together"),
        ([function(parameters={"type": "array"})], "tools[0].function.parameters.type", "must be \"object\".*'array'"),
        ([function(parameters={"properties": 1})], "tools[0].function.parameters.properties", "must be an object"),
    ],
)
def test_what_is_refused(tools: Any, field: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        validated(tools, LIMITS)
    assert caught.value.path == field and caught.value.status == 400
    assert len(caught.value.message) < 300
