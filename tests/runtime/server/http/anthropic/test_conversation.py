"""Anthropic's system, messages and tools as a chat has them; what cannot be said is refused in the client's words."""

from __future__ import annotations

from typing import Any

import pytest

from branchwise.runtime.errors import InvalidRequest
from branchwise.runtime.server.http.anthropic.conversation import MAX_BLOCKS, Conversation
from branchwise.runtime.server.http.anthropic.request import MESSAGES_UNSUPPORTED, MessagesRequest
from branchwise.runtime.server.http.anthropic.translate import chat_request
from branchwise.runtime.server.http.fields.requests import parse
from branchwise.runtime.server.http.openai.chat.request import ChatRequest

HI = {"role": "user", "content": "Hi."}
USE = {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {"at": "é", "n": 1.5}}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "Found."}
TOOL = {"name": "look", "description": "Look.", "input_schema": {"type": "object"}}
MARK = {"cache_control": {"type": "ephemeral"}}


def request(messages: Any, **fields: Any) -> MessagesRequest:
    return parse(MessagesRequest, {"max_tokens": 100, "messages": messages, **fields}, unsupported=MESSAGES_UNSUPPORTED)


def said(messages: Any, **fields: Any) -> list[dict[str, Any]]:
    return Conversation(request(messages, **fields), 100).messages


def chat(**fields: Any) -> ChatRequest:
    return chat_request(request([HI], **fields), 100)[0]


def part(text: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": text, **more}


def test_a_string_is_a_block_of_text() -> None:
    expected = [{"role": "system", "content": [part("Be brief.")]}, {"role": "user", "content": [part("Hi.")]}]
    assert said([HI], system="Be brief.") == expected
    assert said([{"role": "user", "content": [part("Hi.")]}], system=[part("Be brief.")]) == expected
    assert said([HI], system="") == said([HI], system=[]) == expected[1:]


def test_turns_in_a_row_are_one() -> None:
    messages = [HI, HI, {"role": "assistant", "content": "Yes?"}, {"role": "assistant", "content": [USE]}]
    found = said([*messages, {"role": "user", "content": [RESULT]}])
    assert [message["role"] for message in found] == ["user", "assistant", "tool"]
    assert found[0]["content"] == [part("Hi."), part("Hi.")]
    assert found[1]["content"] == [part("Yes?")]
    assert [call["id"] for call in found[1]["tool_calls"]] == ["toolu_1"]


def test_calls_and_results() -> None:
    thought = {"type": "thinking", "thinking": "Hm.", "signature": "s"}
    hidden = {"type": "redacted_thinking", "data": "xyz"}
    again = {**USE, "id": "toolu_2", "input": {}}
    failed = {"type": "tool_result", "tool_use_id": "toolu_2", "is_error": True, "content": [part("No"), part("way.")]}
    found = said(
        [
            HI,
            {"role": "assistant", "content": [thought, hidden, part("Let me see."), USE, again, thought]},
            {"role": "user", "content": [RESULT, failed, part("So?")]},
        ]
    )
    function = {"name": "look", "arguments": '{"at": "é", "n": 1.5}'}
    assert found[1:] == [
        {
            "role": "assistant",
            "content": [part("Let me see.")],
            "reasoning_content": "Hm.\nHm.",
            "tool_calls": [
                {"id": "toolu_1", "type": "function", "function": function},
                {"id": "toolu_2", "type": "function", "function": {"name": "look", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "tool_call_id": "toolu_1", "name": "look", "content": [part("Found.")]},
        {
            "role": "tool",
            "tool_call_id": "toolu_2",
            "name": "look",
            "content": [part("Error:"), part("No"), part("way.")],
        },
        {"role": "user", "content": [part("So?")]},
    ]


def test_a_result_may_be_empty() -> None:
    use = {"role": "assistant", "content": [USE]}
    for empty in ({}, {"content": ""}, {"content": []}, {"content": None}):
        result = {"type": "tool_result", "tool_use_id": "toolu_1", **empty}
        assert said([HI, use, {"role": "user", "content": [result]}])[2]["content"] == [part("")]


def test_where_a_chats_messages_come_from() -> None:
    conversation = Conversation(
        request(
            [HI, {"role": "assistant", "content": [USE]}, {"role": "user", "content": [RESULT, part("So?")]}],
            system="x",
        ),
        100,
    )
    assert conversation.sources == {
        "messages[0]": "system",
        "messages[1]": "messages[0]",
        "messages[2]": "messages[1]",
        "messages[3]": "messages[2].content[0]",
        "messages[4]": "messages[2]",
    }


def test_the_last_message_may_begin_the_answer() -> None:
    for content in ("12 + 30 =", "", []):
        messages = [HI, {"role": "assistant", "content": content}]
        assert chat_request(request(messages), 100)[0].continue_final_message
    assert not chat().continue_final_message


# -- what a breakpoint is on -------------------------------------------------------------------------------------------


def marks(messages: Any, **fields: Any) -> list[tuple[str, str]]:
    """What is marked, and for how long."""
    conversation = Conversation(request(messages, **fields), 100)
    places = [*(conversation.tools or ())]
    for message in conversation.messages:
        places += [*message["content"], *message.get("tool_calls", ())]
    return [
        (place.get("text") or place["function"]["name"], place["cache_control"]["ttl"])
        for place in places
        if "cache_control" in place
    ]


def test_every_kind_of_block_can_be_marked() -> None:
    hour = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    use = {"role": "assistant", "content": [part("I look."), {**USE, **MARK}]}
    result = {"role": "user", "content": [{**RESULT, "content": [part("a"), part("b")], **MARK}]}
    assert marks([HI, use, result], system=[part("s", **hour)], tools=[{**TOOL, **hour}]) == [
        *(("look", "1h"), ("s", "1h"), ("look", "5m"), ("b", "5m")),
    ]
    inner = {"role": "user", "content": [{**RESULT, "content": [part("a", **MARK), part("b")]}]}
    assert marks([HI, {**use, "content": [USE]}, inner]) == [("a", "5m")]


def test_the_requests_own_mark_is_the_last_blocks() -> None:
    assert marks([HI], **MARK) == [("Hi.", "5m")]
    assert marks([{"role": "user", "content": [part("a", **MARK), part("b")]}], **MARK) == [("a", "5m"), ("b", "5m")]
    assert marks(
        [{"role": "user", "content": [part("a", cache_control={"type": "ephemeral", "ttl": "1h"})]}], **MARK
    ) == [("a", "1h")], "it has one already"
    thought = {"role": "assistant", "content": [part("So"), {"type": "thinking", "thinking": "hm"}]}
    assert marks([HI, thought], **MARK) == [("So", "5m")]


# -- the other fields --------------------------------------------------------------------------------------------------


def test_fields_of_a_chat() -> None:
    found = chat(
        tools=[{**TOOL, "strict": True, "type": "custom", "eager_input_streaming": True}],
        tool_choice={"type": "tool", "name": "look", "disable_parallel_tool_use": True},
        stop_sequences=["a"],
        temperature=0,
        top_p=0.5,
        top_k=4,
        min_p=0.1,
        seed=7,
        cache_salt="s",
        prompt_cache_key="k",
        stream=True,
        metadata={"user_id": "me"},
        service_tier="auto",
        thinking={"type": "enabled", "budget_tokens": 50},
        output_config={"effort": "low", "format": {"type": "json_schema", "schema": {"type": "object"}}},
    )
    function = {"name": "look", "description": "Look.", "parameters": {"type": "object"}, "strict": True}
    assert found.tools == [{"type": "function", "function": function}]
    assert found.tool_choice == {"type": "function", "function": {"name": "look"}}
    assert found.parallel_tool_calls is False
    assert (found.max_tokens, found.stop, found.temperature, found.top_p, found.top_k) == (100, ["a"], 0, 0.5, 4)
    assert (found.min_p, found.seed, found.cache_salt, found.prompt_cache_key) == (0.1, 7, "s", "k")
    assert found.stream is True
    assert found.chat_template_kwargs == {"enable_thinking": True, "thinking": True, "thinking_budget": 50}
    assert found.reasoning_effort == "low"
    assert found.response_format is not None
    assert found.response_format["json_schema"]["schema"] == {"type": "object"}


@pytest.mark.parametrize(("type", "expected"), [("enabled", True), ("adaptive", True), ("disabled", False)])
def test_thinking_is_the_templates_business(type: str, expected: bool) -> None:
    assert chat(thinking={"type": type}).chat_template_kwargs == {"enable_thinking": expected, "thinking": expected}
    assert chat().chat_template_kwargs is None


@pytest.mark.parametrize(("type", "expected"), [("auto", "auto"), ("any", "required"), ("none", "none")])
def test_tool_choices(type: str, expected: str) -> None:
    found = chat(tools=[TOOL], tool_choice={"type": type})
    assert (found.tool_choice, found.parallel_tool_calls) == (expected, True)


def test_what_a_schema_is_called_by() -> None:
    format = {"type": "json_schema", "schema": {}}
    for fields, name in (
        ({"output_format": format}, "output_format"),
        ({"output_config": {"format": format}}, "output_config.format"),
    ):
        assert chat_request(request([HI], **fields), 100)[1]["response_format"] == name


@pytest.mark.parametrize(
    ("field", "messages"),
    [
        ("messages[1].content[0].type", [HI, {"role": "user", "content": [USE]}]),
        (
            "messages[1].content[1].type",
            [HI, {"role": "user", "content": [part("x"), {"type": "image", "source": {}}]}],
        ),
        (
            "messages[0].content[0].content[0].type",
            [{"role": "user", "content": [{**RESULT, "content": [{"type": "document"}]}]}],
        ),
        ("messages[1].content[0].tool_use_id", [HI, {"role": "user", "content": [RESULT]}]),
        ("messages[1]", [HI, {"role": "assistant", "content": [part("I look."), USE]}]),
        (
            "messages[1].content[0].cache_control",
            [HI, {"role": "assistant", "content": [{"type": "thinking", "thinking": "x", **MARK}]}],
        ),
        ("messages[0].content[4].cache_control", [{"role": "user", "content": [part("x", **MARK)] * 5}]),
        (
            "messages[0].content[0].cache_control.ttl",
            [{"role": "user", "content": [part("x", cache_control={"type": "ephemeral", "ttl": "1d"})]}],
        ),
    ],
)
def test_what_is_refused(field: str, messages: Any) -> None:
    with pytest.raises(InvalidRequest) as refused:
        if "messages[0].content[0].content" in field:
            messages = [HI, {"role": "assistant", "content": [USE]}, *messages]
            field = field.replace("[0]", "[2]", 1)
        Conversation(request(messages), 100)
    assert refused.value.field == field
    assert field in refused.value.message


def test_counts_are_bounded() -> None:
    with pytest.raises(InvalidRequest, match="messages must have at most 100 entries, got 101"):
        Conversation(request([HI] * 101), 100)
    with pytest.raises(InvalidRequest, match=rf"at most {MAX_BLOCKS} blocks"):
        Conversation(request([{"role": "user", "content": [part("x")] * (MAX_BLOCKS // 8 + 1)}] * 8), 100)
    with pytest.raises(InvalidRequest, match=r"messages\[0\].content must have at most 4096 blocks, got 4097"):
        Conversation(request([{"role": "user", "content": [part("x")] * 4097}]), 100)
    with pytest.raises(InvalidRequest, match=r"^cache_control is one too many"):
        Conversation(request([{"role": "user", "content": [*[part("x", **MARK)] * 4, part("y")]}], **MARK), 100)
