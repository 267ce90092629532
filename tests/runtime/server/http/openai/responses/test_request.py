"""From a responses request to a chat: the same conversation, and errors in the words of the one who sent it."""

from __future__ import annotations

from typing import Any

import pytest

from branchwise.runtime.chat.messages import conversation
from branchwise.runtime.chat.template import ChatTemplate
from branchwise.runtime.config import EngineConfig, ServerConfig
from branchwise.runtime.errors import InvalidRequest
from branchwise.runtime.server.http.openai.chat.renamed import renamed
from branchwise.runtime.server.http.openai.chat.request import ChatRequest
from branchwise.runtime.server.http.openai.responses.items import Conversation
from branchwise.runtime.server.http.openai.responses.request import chat_of, read
from branchwise.runtime.server.http.openai.responses.route import schema

CONFIG = ServerConfig(engine=EngineConfig(), max_messages=8, max_tools=2)
TEMPLATE = ChatTemplate("{% for m in messages %}{{ m.role }}{{ (m.tool_calls or []) | tojson }}{% endfor %}", {})


def chat(**fields: Any) -> tuple[ChatRequest, dict[str, str]]:
    return chat_of(read({"input": "hi", **fields}), CONFIG)


def messages(*items: Any, instructions: str | None = None) -> list[dict[str, Any]]:
    return Conversation(instructions, list(items), 100).messages


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"type": "message", "role": role, "content": content, **more}


def call(id: str, name: str = "f") -> dict[str, Any]:
    return {"type": "function_call", "id": f"fc_{id}", "call_id": id, "name": name, "arguments": "{}"}


def made(id: str, name: str = "f") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": "{}"}}


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
    assert Conversation(None, "hello", 1).messages == [{"role": "user", "content": "hello"}]
    assert Conversation("Be brief.", "hello", 1).messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
    ]


def test_what_one_turn_wrote_is_one_message() -> None:
    found = messages(
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
    assert [message["role"] for message in found] == ["user", "assistant", "tool", "tool", "assistant"]
    assert found[1]["reasoning_content"] == "hm"
    assert found[1]["content"] == [{"type": "output_text", "text": "let me see", "annotations": []}]
    assert found[1]["tool_calls"] == [made("a"), made("b", "g")]
    assert found[2] == {"role": "tool", "tool_call_id": "a", "content": "ok"}
    assert found[3]["content"] == [{"type": "input_text", "text": "fine"}]
    assert found[4] == {"role": "assistant", "reasoning_content": "so", "content": "Done."}


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
    assert [message["role"] for message in messages(*items)] == roles


def test_reasoning_may_be_empty_or_a_summary() -> None:
    bare = {"type": "reasoning", "id": "rs_1", "summary": []}
    assert messages(USER, bare, {**bare, "content": None, "encrypted_content": None}) == [USER]
    summed = {**bare, "summary": [{"type": "summary_text", "text": "a"}, {"type": "summary_text", "text": "b"}]}
    assert messages(USER, summed)[1] == {"role": "assistant", "reasoning_content": "a\nb"}


ITEM_ERRORS: list[tuple[list[Any], str]] = [
    ([USER, 7], "input[1]"),
    ([USER, {}], "input[1].type"),
    ([USER, {"type": None, "id": "msg_1"}], "input[1].type"),
    ([USER, {"type": "item_reference", "id": "msg_1"}], "input[1].type"),
    ([USER, {"type": "web_search_call"}], "input[1].type"),
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
    ([USER, thought("x", encrypted_content="abc")], "input[1].encrypted_content"),
    ([USER, thought("x", content="x")], "input[1].content"),
    ([USER, thought("x", content=[{"text": 7}])], "input[1].content[0]"),
    ([USER, thought("x", content=None, summary=["x"])], "input[1].summary[0]"),
]


@pytest.mark.parametrize("instructions", [None, "Be brief."])
@pytest.mark.parametrize(("items", "field"), ITEM_ERRORS)
def test_errors_name_the_item(items: list[Any], field: str, instructions: str | None) -> None:
    """Also what only the chat finds out, whatever items became of messages before it."""
    sources: dict[str, str] = {}
    with pytest.raises(InvalidRequest) as refused:
        try:
            found = Conversation(instructions, items, 100)
            sources = found.sources
            conversation(found.messages, TEMPLATE)
        except InvalidRequest as error:
            raise renamed(error, sources) from error
    assert refused.value.field == field
    assert field in refused.value.message
    assert "messages" not in refused.value.message


def test_a_field_of_the_chat_is_the_same_field() -> None:
    made, _ = chat(
        temperature=0.5, top_k=3, seed=1, stop=["a"], prompt_cache_key="k", priority=2, regex="a+", max_output_tokens=5
    )
    assert (made.temperature, made.top_k, made.seed, made.stop, made.priority) == (0.5, 3, 1, ["a"], 2)
    assert (made.prompt_cache_key, made.regex, made.max_completion_tokens, made.n) == ("k", "a+", 5, 1)
    assert (made.logprobs, made.top_logprobs) == (False, None)
    wanted, _ = chat(include=["message.output_text.logprobs"], top_logprobs=2)
    assert (wanted.logprobs, wanted.top_logprobs) == (True, 2)
    assert chat(reasoning={"effort": "low"})[0].reasoning_effort == "low"


def test_tools_and_formats_in_the_chats_words() -> None:
    tool = {"type": "function", "name": "f", "parameters": {}, "strict": True, "description": None, "output_schema": {}}
    made, sources = chat(tools=[tool], tool_choice={"type": "function", "name": "f"})
    assert made.tools == [{"type": "function", "function": {"name": "f", "parameters": {}, "strict": True}}]
    assert made.tool_choice == {"type": "function", "name": "f"}
    error = InvalidRequest("no", field="tools[0].function.name")
    assert renamed(error, sources).field == "tools[0].name"
    schema = {"type": "object"}
    wanted, _ = chat(text={"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}})
    assert wanted.response_format == {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert chat(text={"format": {"type": "json_object"}})[0].response_format == {"type": "json_object"}
    assert chat(text={"verbosity": "low"})[0].response_format is None


def test_the_schema_tells_what_it_takes() -> None:
    described = schema()["requestBody"]["content"]["application/json"]["schema"]
    assert described["required"] == ["input"]
    assert {"instructions", "max_output_tokens", "text", "reasoning", "temperature", "tools"} <= set(
        described["properties"]
    )
    assert described["properties"]["response_format"]["type"] == "null"


def test_what_is_called_something_else_here_says_so() -> None:
    for name, value, said in (
        ("max_tokens", 5, "max_output_tokens"),
        ("messages", [USER], "input"),
        ("response_format", {"type": "text"}, "text.format"),
        ("reasoning_effort", "low", "reasoning.effort"),
        ("previous_response_id", "resp_1", "stores no responses"),
        ("prompt", {"id": "pmpt_1"}, "instructions"),
    ):
        with pytest.raises(InvalidRequest) as refused:
            chat(**{name: value})
        assert refused.value.field == name
        assert said in refused.value.message
    chat(background=False, logprobs=False, previous_response_id=None)
