"""From a responses request to what it asks for, and errors that name the client's own fields."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from branchwise.runtime.chat.conversation import CallPart, ChatTurn, TextPart, ThinkingPart
from branchwise.runtime.chat.messages import template_messages
from branchwise.runtime.chat.template import ChatTemplate
from branchwise.runtime.errors import InvalidRequest
from branchwise.runtime.server.http.chat.spec import ChatSpec
from branchwise.runtime.server.http.openai.responses.items import response_turns
from branchwise.runtime.server.http.openai.responses.request import ResponsesRequest, read, response_spec
from branchwise.runtime.server.http.state import AppState

TEMPLATE = ChatTemplate("{% for m in messages %}{{ m.role }}{{ (m.tool_calls or []) | tojson }}{% endfor %}", {})


@pytest.fixture
def asked(make_state: Callable[..., AppState]) -> Callable[..., ChatSpec]:
    state = make_state(max_messages=8, max_tools=2)
    return lambda **fields: response_spec(read({"input": "hi", **fields}), state)


def turns(*items: Any) -> list[ChatTurn]:
    return response_turns(None, list(items), 100, [])


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"type": "message", "role": role, "content": content, **more}


def call(id: str, name: str = "f") -> dict[str, Any]:
    return {"type": "function_call", "id": f"fc_{id}", "call_id": id, "name": name, "arguments": "{}"}


def output(id: str, value: Any = "ok") -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": id, "output": value}


def thought(text: str, **more: Any) -> dict[str, Any]:
    return {
        "type": "reasoning",
        "id": "rs_1",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": text}],
        **more,
    }


USER = {"role": "user", "content": "x"}


def test_a_string_is_what_the_user_says() -> None:
    said = ChatTurn("user", [TextPart("hello", "input")], "input")
    assert response_turns(None, "hello", 1, []) == [said]
    system = ChatTurn("system", [TextPart("Be brief.", "instructions")], "instructions")
    assert response_turns("Be brief.", "hello", 1, []) == [system, said]


def test_what_one_turn_wrote_is_one_turn() -> None:
    found = turns(
        USER,
        thought("hm"),
        said("assistant", [{"type": "output_text", "text": "let me see", "annotations": []}]),
        call("a"),
        call("b", "g"),
        output("a"),
        output("b", [{"type": "input_text", "text": "fine"}]),
        thought("so"),
        said("assistant", "Done."),
    )
    calls = [CallPart("f", "{}", "a", "input[3]"), CallPart("g", "{}", "b", "input[4]")]
    assert found == [
        ChatTurn("user", [TextPart("x", "input[0].content")], "input[0]"),
        ChatTurn("assistant", [ThinkingPart("hm"), TextPart("let me see", "input[2].content[0]"), *calls], "input[1]"),
        ChatTurn("tool", [TextPart("ok", "input[5].output")], "input[5]", call_id="a"),
        ChatTurn("tool", [TextPart("fine", "input[6].output[0]")], "input[6]", call_id="b"),
        ChatTurn("assistant", [ThinkingPart("so"), TextPart("Done.", "input[8].content")], "input[7]"),
    ]


@pytest.mark.parametrize(
    ("items", "roles"),
    [
        ([said("assistant", "a"), said("assistant", "b")], ["assistant"] * 2),
        ([call("a"), said("assistant", "b"), output("a")], ["assistant", "tool"]),
        ([said("assistant", "a"), call("a"), said("assistant", "b")], ["assistant"] * 2),
        ([call("a"), thought("hm"), call("b")], ["assistant"] * 2),
        ([said("assistant", "a"), thought("hm"), said("assistant", "b")], ["assistant"] * 2),
        ([thought("a"), thought("b")], ["assistant"] * 2),
        ([said("assistant", "a"), USER, call("a")], ["assistant", "user", "assistant"]),
        ([said("developer", "a"), said("system", "b")], ["developer", "system"]),
    ],
)
def test_where_a_message_ends(items: list[Any], roles: list[str]) -> None:
    assert [turn.role for turn in turns(*items)] == roles


def test_reasoning_may_be_empty_or_a_summary() -> None:
    bare = {"type": "reasoning", "id": "rs_1", "summary": []}
    assert len(turns(USER, bare, {**bare, "content": None, "encrypted_content": None})) == 1
    summed = {**bare, "summary": [{"type": "summary_text", "text": "a"}, {"type": "summary_text", "text": "b"}]}
    assert turns(USER, summed)[1].thinking == "a\nb"
    assert turns(USER, {**summed, "encrypted_content": "another provider's"})[1].thinking == "a\nb"


def test_calls_of_custom_tools_and_of_namespaces() -> None:
    items = [
        USER,
        {"type": "custom_tool_call", "call_id": "a", "name": "patch", "input": "*** Begin"},
        {**call("b"), "namespace": "mcp__files__"},
        {"type": "custom_tool_call_output", "call_id": "a", "output": "done"},
        output("b"),
    ]
    found = turns(*items)
    assert [turn.role for turn in found] == ["user", "assistant", "tool", "tool"]
    assert found[1].calls == [
        CallPart("patch", '{"input": "*** Begin"}', "a", "input[1]"),
        CallPart("mcp__files__f", "{}", "b", "input[2]"),
    ]
    assert (found[2].call_id, found[2].texts) == ("a", ["done"])


def test_items_of_hosted_tools_are_left_out_and_named() -> None:
    items = [
        USER,
        {"type": "web_search_call", "id": "ws_1", "status": "completed"},
        said("assistant", "It is sunny."),
        {"type": "local_shell_call", "call_id": "a", "action": {"type": "exec", "command": ["ls"]}},
        {"type": "local_shell_call_output", "id": "a", "output": "x"},
        USER,
    ]
    left_out: list[str] = []
    found = response_turns(None, items, 100, left_out)
    assert [turn.role for turn in found] == ["user", "assistant", "user"]
    assert left_out == ["input[1] web_search_call", "input[3] local_shell_call", "input[4] local_shell_call_output"]
    with pytest.raises(InvalidRequest, match="input must have an item that this server takes"):
        response_turns(None, [items[1]], 100, [])


ITEM_ERRORS: list[tuple[list[Any], str]] = [
    ([USER, 7], "input[1]"),
    ([USER, {}], "input[1].type"),
    ([USER, {"type": None, "id": "msg_1"}], "input[1].type"),
    ([USER, {"type": "item_reference", "id": "msg_1"}], "input[1].type"),
    ([USER, {"type": "web_search"}], "input[1].type"),
    ([USER, {"type": ["message"]}], "input[1].type"),
    ([{"role": "tool", "content": "x"}], "input[0].role"),
    ([{"type": "message", "content": "x"}], "input[0].role"),
    ([USER, said("assistant", None)], "input[1].content"),
    ([USER, said("user", 7)], "input[1].content"),
    ([USER, said("user", [{"type": "input_text", "text": 7}])], "input[1].content[0].text"),
    ([USER, said("user", [{"type": "input_text", "text": "x"}, {"type": "input_image"}])], "input[1].content[1].type"),
    ([USER, said("user", [{"type": "refusal", "refusal": "x"}])], "input[1].content[0].type"),
    ([USER, said("assistant", [{"type": "output_text"}])], "input[1].content[0].text"),
    ([USER, thought("a"), said("assistant", [7])], "input[2].content[0]"),
    ([USER, said("assistant", "a"), call("a"), {**call("b"), "name": ""}], "input[3].name"),
    ([USER, {**call("b"), "call_id": None}], "input[1].call_id"),
    ([USER, {**call("b"), "arguments": 7}], "input[1].arguments"),
    ([USER, call("a"), {**call("b"), "arguments": "{"}], "input[2].arguments"),
    ([USER, call("a"), {**output("a"), "output": None}], "input[2].output"),
    ([USER, call("a"), {**output("a"), "call_id": 7}], "input[2].call_id"),
    ([USER, call("a"), output("a", [{"type": "input_file"}])], "input[2].output[0].type"),
    ([USER, thought("x", content="x")], "input[1].content"),
    ([USER, thought("x", content=[{"text": 7}])], "input[1].content[0]"),
    ([USER, thought("x", content=None, summary=["x"])], "input[1].summary[0]"),
]


@pytest.mark.parametrize("instructions", [None, "Be brief."])
@pytest.mark.parametrize(("items", "field"), ITEM_ERRORS)
def test_errors_name_the_item(items: list[Any], field: str, instructions: str | None) -> None:
    """Also where only the chat template cannot read them, whatever turns came before."""
    with pytest.raises(InvalidRequest) as refused:
        template_messages(response_turns(instructions, items, 100, []), TEMPLATE)
    assert refused.value.path == field
    assert field in refused.value.message
    assert "messages" not in refused.value.message


def test_sampling_fields_have_their_names(asked: Callable[..., ChatSpec]) -> None:
    spec = asked(
        temperature=0.5, top_k=3, seed=1, stop=["a"], prompt_cache_key="k", priority=2, regex="a+", max_output_tokens=5
    )
    params = spec.params
    assert (params.temperature, params.top_k, params.seed, params.stop) == (0.5, 3, 1, ("a",))
    assert (spec.cache.prompt_cache_key, spec.priority) == ("k", -2)
    assert (params.regex, params.max_tokens, params.n, params.logprobs) == ("a+", 5, 1, None)
    assert asked(include=["message.output_text.logprobs"], top_logprobs=2).params.logprobs == 2
    assert asked(reasoning={"effort": "low"}).conversation.reasoning_effort == "low"


def test_tools_are_functions_without_a_level_between(asked: Callable[..., ChatSpec]) -> None:
    tool = {"type": "function", "name": "f", "parameters": {}, "strict": True, "description": None, "output_schema": {}}
    spec = asked(tools=[tool], tool_choice={"type": "function", "name": "f"})
    [offered] = spec.conversation.tools
    assert offered.definition == {"type": "function", "function": {"name": "f", "parameters": {}}}
    assert (offered.tool.strict, offered.schema_path) == (True, "tools[0].parameters")
    assert spec.tool_choice == ("required", ("f",))
    with pytest.raises(InvalidRequest) as refused:
        asked(tools=[{**tool, "name": "a b"}])
    assert refused.value.path == "tools[0].name"


def test_the_format_of_the_text(asked: Callable[..., ChatSpec]) -> None:
    schema = {"type": "object"}
    wanted = asked(text={"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}})
    assert (wanted.params.json_schema, wanted.names["json_schema"]) == (schema, "text.format")
    assert asked(text={"format": {"type": "json_object"}}).params.json_schema == '{"type":"object"}'
    assert asked(text={"verbosity": "low"}).params.json_schema is None
    with pytest.raises(InvalidRequest, match=r"text\.format cannot be combined with regex"):
        asked(text={"format": {"type": "json_object"}}, regex="a")


def test_the_schema_tells_what_it_takes() -> None:
    described = ResponsesRequest.model_json_schema()
    assert described["required"] == ["input"]
    assert {"instructions", "max_output_tokens", "text", "reasoning", "temperature", "tools"} <= set(
        described["properties"]
    )
    assert described["properties"]["response_format"]["type"] == "null"


def test_what_is_called_something_else_here_says_so(asked: Callable[..., ChatSpec]) -> None:
    for name, value, said in (
        ("max_tokens", 5, "max_output_tokens"),
        ("messages", [USER], "input"),
        ("response_format", {"type": "text"}, "text.format"),
        ("reasoning_effort", "low", "reasoning.effort"),
        ("previous_response_id", "resp_1", "stores no responses"),
        ("prompt", {"id": "pmpt_1"}, "instructions"),
    ):
        with pytest.raises(InvalidRequest) as refused:
            asked(**{name: value})
        assert refused.value.path == name
        assert said in refused.value.message
    asked(background=False, logprobs=False, previous_response_id=None)
