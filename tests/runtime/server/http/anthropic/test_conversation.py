"""Anthropic's system, messages and tools as turns; errors name the client's own blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from branchwise.runtime.chat.conversation import MAX_PIECES, Breakpoint, CallPart, ChatTurn, TextPart, ThinkingPart
from branchwise.runtime.errors import InvalidRequest
from branchwise.runtime.server.http.anthropic.conversation import ConversationReader
from branchwise.runtime.server.http.anthropic.request import MESSAGES_UNSUPPORTED, MessagesRequest
from branchwise.runtime.server.http.anthropic.spec import messages_spec
from branchwise.runtime.server.http.chat.spec import ChatSpec
from branchwise.runtime.server.http.fields.parse import parse
from branchwise.runtime.server.http.state import AppState

HI = {"role": "user", "content": "Hi."}
USE = {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {"at": "é", "n": 1.5}}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "Found."}
TOOL = {"name": "look", "description": "Look.", "input_schema": {"type": "object"}}
MARK = {"cache_control": {"type": "ephemeral"}}


def request(messages: Any, **fields: Any) -> MessagesRequest:
    return parse(MessagesRequest, {"max_tokens": 100, "messages": messages, **fields}, unsupported=MESSAGES_UNSUPPORTED)


def said(messages: Any, **fields: Any) -> list[ChatTurn]:
    return ConversationReader(request(messages, **fields), 100).turns


@pytest.fixture
def asked(make_state: Callable[..., AppState]) -> Callable[..., ChatSpec]:
    state = make_state()
    return lambda messages=(HI,), **fields: messages_spec(request(list(messages), **fields), state)


def part(text: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": text, **more}


def test_a_string_is_a_block_of_text() -> None:
    hi = ChatTurn("user", [TextPart("Hi.", "messages[0].content")], "messages[0]")
    assert said([HI], system="Be brief.") == [ChatTurn("system", [TextPart("Be brief.", "system")], "system"), hi]
    blocks = said([{"role": "user", "content": [part("Hi.")]}], system=[part("Be brief.")])
    assert [(turn.role, turn.texts) for turn in blocks] == [("system", ["Be brief."]), ("user", ["Hi."])]
    assert said([HI], system="") == said([HI], system=[]) == [hi]


def test_turns_in_a_row_are_one() -> None:
    messages = [HI, HI, {"role": "assistant", "content": "Yes?"}, {"role": "assistant", "content": [USE]}]
    found = said([*messages, {"role": "user", "content": [RESULT]}])
    assert [turn.role for turn in found] == ["user", "assistant", "tool"]
    assert found[0].texts == ["Hi.", "Hi."]
    assert found[1].texts == ["Yes?"]
    assert [call.id for call in found[1].calls] == ["toolu_1"]


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
    one, two = "messages[1].content", "messages[2].content"
    calls = [CallPart("look", USE["input"], "toolu_1", f"{one}[3]"), CallPart("look", {}, "toolu_2", f"{one}[4]")]
    failure = [
        TextPart("Error:", f"{two}[1]"),
        TextPart("No", f"{two}[1].content[0]"),
        TextPart("way.", f"{two}[1].content[1]"),
    ]
    assert found[1:] == [
        ChatTurn(
            "assistant",
            [ThinkingPart("Hm."), TextPart("Let me see.", f"{one}[2]"), *calls, ThinkingPart("Hm.")],
            "messages[1]",
        ),
        ChatTurn("tool", [TextPart("Found.", f"{two}[0].content")], f"{two}[0]", "look", "toolu_1"),
        ChatTurn("tool", failure, f"{two}[1]", "look", "toolu_2"),
        ChatTurn("user", [TextPart("So?", f"{two}[2]")], "messages[2]"),
    ]


def test_a_result_may_be_empty() -> None:
    use = {"role": "assistant", "content": [USE]}
    for empty in ({}, {"content": ""}, {"content": []}, {"content": None}):
        result = {"type": "tool_result", "tool_use_id": "toolu_1", **empty}
        assert said([HI, use, {"role": "user", "content": [result]}])[2].texts == [""]


def test_the_last_message_may_begin_the_answer(asked: Callable[..., ChatSpec]) -> None:
    for content in ("12 + 30 =", "", []):
        assert asked([HI, {"role": "assistant", "content": content}]).conversation.continue_final_message
    assert not asked().conversation.continue_final_message


# -- what a breakpoint is on -------------------------------------------------------------------------------------------


def marks(messages: Any, **fields: Any) -> list[tuple[str, Any]]:
    """What is marked, and for how long."""
    read = ConversationReader(request(messages, **fields), 100)
    found: list[tuple[str, Breakpoint | None]] = [(tool.tool.name, tool.breakpoint) for tool in read.tools]
    for part in (part for turn in read.turns for part in turn.parts):
        if not isinstance(part, ThinkingPart):
            found.append((part.text if isinstance(part, TextPart) else part.name, part.breakpoint))
    return [(name, breakpoint.ttl) for name, breakpoint in found if breakpoint is not None]


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


def test_fields_of_a_chat(asked: Callable[..., ChatSpec]) -> None:
    spec = asked(
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
    [offered] = spec.conversation.tools
    function = {"name": "look", "description": "Look.", "parameters": {"type": "object"}}
    assert offered.definition == {"type": "function", "function": function}
    assert (offered.tool.strict, offered.schema_path) == (True, "tools[0].input_schema")
    assert spec.tool_choice == ("required", ("look",))
    assert spec.parallel_tool_calls is False
    params = spec.params
    assert (params.max_tokens, params.stop, params.temperature, params.top_p, params.top_k) == (100, ("a",), 0, 0.5, 4)
    assert (params.min_p, params.seed) == (0.1, 7)
    assert (spec.cache.cache_salt, spec.cache.prompt_cache_key, spec.stream) == ("s", "k", True)
    told = {"enable_thinking": True, "thinking": True, "thinking_budget": 50}
    assert spec.conversation.chat_template_kwargs == told
    assert spec.conversation.reasoning_effort == "low"
    assert (params.json_schema, spec.names["json_schema"]) == ({"type": "object"}, "output_config.format")


@pytest.mark.parametrize(("type", "expected"), [("enabled", True), ("adaptive", True), ("disabled", False)])
def test_thinking_is_the_templates_business(asked: Callable[..., ChatSpec], type: str, expected: bool) -> None:
    told = asked(thinking={"type": type}).conversation.chat_template_kwargs
    assert told == {"enable_thinking": expected, "thinking": expected}
    assert asked().conversation.chat_template_kwargs is None


@pytest.mark.parametrize(("type", "expected"), [("auto", "auto"), ("any", "required"), ("none", "none")])
def test_tool_choices(asked: Callable[..., ChatSpec], type: str, expected: str) -> None:
    spec = asked(tools=[TOOL], tool_choice={"type": type})
    assert (spec.tool_choice, spec.parallel_tool_calls) == ((expected, None), True)


def test_what_a_schema_is_called_by(asked: Callable[..., ChatSpec]) -> None:
    format = {"type": "json_schema", "schema": {}}
    for fields, name in (
        ({"output_format": format}, "output_format"),
        ({"output_config": {"format": format}}, "output_config.format"),
    ):
        assert asked(**fields).names["json_schema"] == name


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
        ConversationReader(request(messages), 100)
    assert refused.value.path == field
    assert field in refused.value.message


def test_counts_are_bounded() -> None:
    with pytest.raises(InvalidRequest, match="messages must have at most 100 entries, got 101"):
        ConversationReader(request([HI] * 101), 100)
    with pytest.raises(InvalidRequest, match=rf"at most {MAX_PIECES} blocks"):
        ConversationReader(request([{"role": "user", "content": [part("x")] * (MAX_PIECES // 8 + 1)}] * 8), 100)
    with pytest.raises(InvalidRequest, match=r"messages\[0\].content must have at most 4096 blocks, got 4097"):
        ConversationReader(request([{"role": "user", "content": [part("x")] * 4097}]), 100)
    with pytest.raises(InvalidRequest, match=r"^cache_control is one too many"):
        ConversationReader(request([{"role": "user", "content": [*[part("x", **MARK)] * 4, part("y")]}], **MARK), 100)
