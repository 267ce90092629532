"""A response, whole and streamed: the events add up to the same items, and both to what the model wrote."""

from __future__ import annotations

import json
import typing
from collections.abc import Callable
from typing import Any

import openai.types.responses as sdk
import pytest

from branchwise.runtime.chat.openai_tools import openai_tools
from branchwise.runtime.chat.tools.definitions import Tool
from branchwise.runtime.chat.tools.parser import StreamParser
from branchwise.runtime.errors import EngineDead, InvalidRequest, Overloaded
from branchwise.runtime.messages import Delta
from branchwise.runtime.server.http.openai.responses.reply import ResponseReply
from branchwise.runtime.tokenizer.tokenizer import Tokenizer

LOGPROBS = {"include": ["message.output_text.logprobs"]}
EVENTS: dict[str, Any] = {
    typing.get_args(kind.model_fields["type"].annotation)[0]: kind
    for kind in typing.get_args(typing.get_args(sdk.ResponseStreamEvent)[0])
}
SIZES = (1, 2, 3, 7, 1000)  # tokens in a delta


def streamed(answer: ResponseReply, deltas: list[Delta]) -> list[dict[str, Any]]:
    sent = [event for delta in deltas for event in answer.events([(0, delta)])]
    return decoded([*sent, *answer.end()])


def decoded(sent: list[bytes]) -> list[dict[str, Any]]:
    """Each checked against the client's own type for it."""
    events = []
    for i, raw in enumerate(sent):
        name, data = raw.decode().split("\n", 1)
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == i
        EVENTS[event["type"]].model_validate(event)
        events.append(event)
    return events


def assembled(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items, as a client that trusts nothing puts them together."""
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert [event["response"]["output"] for event in events[:2]] == [[], []]
    items: list[dict[str, Any]] = []
    open_item: dict[str, Any] | None = None
    for event in events[2:-1]:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert open_item is None, "one item at a time"
            assert event["output_index"] == len(items)
            assert event["item"]["status"] == "in_progress"
            open_item = event["item"]
            continue
        assert open_item is not None
        assert event["output_index"] == len(items)
        if kind == "output_item.done":
            done = event["item"]
            assert {**open_item, "status": done["status"]} == done, "what was streamed is what is done"
            items.append(done)
            open_item = None
            continue
        assert event["item_id"] == open_item["id"]
        if kind.startswith("function_call_arguments"):
            if kind.endswith("delta"):
                assert event["delta"]
                open_item["arguments"] += event["delta"]
            else:
                assert event["arguments"] == open_item["arguments"]
            continue
        assert event["content_index"] == 0
        if kind == "content_part.added":
            assert open_item["content"] == []
            open_item["content"] = [event["part"]]
        elif kind == "content_part.done":
            assert open_item["content"] == [event["part"]]
        else:
            part = open_item["content"][0]
            assert kind.startswith(part["type"])
            if kind.endswith("delta"):
                part["text"] += event["delta"]
                if part["type"] == "output_text":
                    part["logprobs"] += event["logprobs"]
            else:
                assert (event["text"], event.get("logprobs")) == (part["text"], part.get("logprobs"))
    assert open_item is None
    return items


def anonymous(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    prefixes = {"message": "msg_", "reasoning": "rs_", "function_call": "fc_"}
    assert all(item["id"].startswith(prefixes[item["type"]]) for item in items)
    assert len({item["id"] for item in items}) == len(items)
    return [{name: value for name, value in item.items() if name != "id"} for item in items]


def texts(items: list[dict[str, Any]], kind: str) -> str:
    return "".join(part["text"] for item in items if item["type"] == kind for part in item["content"])


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_every_stream_adds_up_to_the_whole(case: Any, told: Any, make_answer: Any, reason: str) -> None:
    """For every output of the corpus, however its tokens come."""
    whole = make_answer(case.parser(), **LOGPROBS).whole([(0, delta) for delta in told(case.text, 1000, reason)])
    sdk.Response.model_validate(whole)
    items = whole["output"]
    assert texts(items, "message") == case.content
    assert texts(items, "reasoning") == case.reasoning
    calls = [item for item in items if item["type"] == "function_call"]
    assert [(call["name"], call["arguments"], call["status"] == "completed") for call in calls] == list(case.calls)
    assert whole["status"] == ("completed" if reason == "stop" else "incomplete")
    for item in items[:-1]:
        assert item["status"] == "completed" or item["type"] == "function_call"
    for size in SIZES:
        events = streamed(make_answer(case.parser(), **LOGPROBS), told(case.text, size, reason))
        last = events[-1]
        assert last["type"] == f"response.{whole['status']}"
        found = assembled(events)
        assert found == last["response"]["output"]
        assert anonymous(found) == anonymous(items)
        assert last["response"]["usage"] == whole["usage"]
        assert set(last["response"]) == set(whole)


def test_text_without_anything_to_parse(told: Any, make_answer: Any, tokenizer: Tokenizer) -> None:
    text = "Hello, 你好 🙂."
    for size in SIZES:
        answer = make_answer(None, **LOGPROBS)
        [item] = assembled(streamed(answer, told(text, size)))
        assert item["content"][0]["text"] == text
        rows = item["content"][0]["logprobs"]
        assert b"".join(bytes(row["bytes"]) for row in rows).decode() == text
        [bare] = assembled(streamed(make_answer(None), told(text, size)))
        assert bare["content"][0]["logprobs"] == []


def test_logprobs_are_of_the_messages_own_tokens(told: Any, make_answer: Any, tokenizer: Tokenizer) -> None:
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    text = f"<think>Let me see.</think>It is so.{call}And so on."
    # A token belongs where its first character is; this tokenizer's tokens of ASCII are characters.
    want: list[list[str]] = [[], []]
    at = 0
    for id in tokenizer.encode(text, add_special_tokens=False).tolist():
        for found, part in zip(want, ("It is so.", "And so on."), strict=True):
            start = text.index(part)
            if start <= at < start + len(part):
                found.append(tokenizer.token_text(id))
        at += len(tokenizer.token_text(id))
    for size in SIZES:
        parser = StreamParser("hermes", "think", [Tool("f", {"type": "object"})])
        items = assembled(streamed(make_answer(parser, **LOGPROBS), told(text, size)))
        messages = [item for item in items if item["type"] == "message"]
        assert [item["content"][0]["text"] for item in messages] == ["It is so.", "And so on."]
        assert [[row["token"] for row in item["content"][0]["logprobs"]] for item in messages] == want


def test_calls_after_the_first_are_left_out(told: Any, make_answer: Any) -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>' * 3 + " Done."
    for size in SIZES:
        parser = StreamParser("hermes", None, [Tool("f", {"type": "object"})])
        items = assembled(streamed(make_answer(parser, one_call=True, **LOGPROBS), told(text, size)))
        assert [item["type"] for item in items] == ["function_call", "message"]
        assert items[0]["arguments"] == '{"a": 1}'
        assert texts(items, "message") == " Done."


@pytest.mark.parametrize(
    ("reason", "status", "details", "last"),
    [
        ("stop", "completed", None, "response.completed"),
        ("length", "incomplete", {"reason": "max_output_tokens"}, "response.incomplete"),
        ("abort", "cancelled", None, "response.incomplete"),
    ],
)
def test_how_it_ended(told: Any, make_answer: Any, reason: str, status: str, details: Any, last: str) -> None:
    whole = make_answer(None).whole([(0, delta) for delta in told("some text", 1000, reason)])
    assert (whole["status"], whole["incomplete_details"]) == (status, details)
    assert whole["output"][0]["status"] == ("completed" if status == "completed" else "incomplete")
    assert isinstance(whole["completed_at"], int) == (status == "completed")
    events = streamed(make_answer(None), told("some text", 1, reason))
    assert events[-1]["type"] == last
    assert events[-1]["response"]["status"] == status
    assert sum(event["type"] == last for event in events) == 1


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (EngineDead("the engine has stopped"), "server_error", "the engine has stopped"),
        (Overloaded("the server is shutting down"), "server_error", "the server is shutting down"),
        (ZeroDivisionError("secret"), "server_error", "internal error; the server's log says more"),
        (
            InvalidRequest("text.format", "is no use"),
            "invalid_prompt",
            "text.format is no use",
        ),
    ],
)
def test_a_failure_midway_is_told_with_what_there_was(
    told: Any, make_answer: Any, error: Exception, code: str, message: str
) -> None:
    answer = make_answer(None)
    [first, *_] = told("some text", 1)
    events = decoded([*answer.events([(0, first)]), answer.fail(error)])
    last = events[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["id"] == events[0]["response"]["id"]
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"] == {"code": code, "message": message}
    [item] = last["response"]["output"]
    assert item["status"] == "incomplete"
    assert item["content"][0]["text"] == first.text


def test_what_was_asked_for_is_given_back(make_answer: Callable[..., ResponseReply], told: Any) -> None:
    tool = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}, "description": "d"}
    form = {"type": "json_schema", "name": "x", "schema": {"type": "object"}, "strict": True}
    asked: dict[str, Any] = {
        "instructions": "Be brief.",
        "max_output_tokens": 7,
        "max_tool_calls": 3,
        "metadata": {"a": "b"},
        "parallel_tool_calls": False,
        "prompt_cache_key": "k",
        "prompt_cache_options": {"mode": "explicit", "ttl": "30m"},
        "reasoning": {"effort": "low", "summary": "auto"},
        "safety_identifier": "s",
        "temperature": 0.5,
        "text": {"format": form, "verbosity": "low"},
        "tool_choice": {"type": "function", "name": "f"},
        "tools": [tool],
        "top_p": 0.9,
        "truncation": "disabled",
        "user": "u",
    }
    whole = make_answer(None, store=True, **asked).whole([(0, delta) for delta in told("x", 1)])
    parsed = sdk.Response.model_validate(whole)
    assert {name: whole[name] for name in asked} == {**asked, "tools": [{**tool, "strict": False}]}
    assert parsed.tools[0].type == "function"
    assert whole["store"] is False
    # Every field the client's model has is there, null or not.
    assert set(sdk.Response.model_fields) <= set(whole)
    bare = make_answer(None).whole([(0, delta) for delta in told("x", 1)])
    assert (bare["tool_choice"], bare["tools"], bare["metadata"], bare["top_logprobs"]) == ("auto", [], {}, 0)
    assert bare["text"]["format"] == {"type": "text"}


def test_calls_are_told_as_the_client_defined_their_tools(make_answer: Any, told: Any) -> None:
    """A namespace's function has its own name again, and a custom tool's input is its text."""
    custom = {"type": "custom", "name": "patch"}
    function = {"type": "function", "name": "f", "parameters": {"type": "object"}}
    tools = [custom, {"type": "namespace", "name": "files", "description": "d", "tools": [function, custom]}]
    offered = {one.tool.name: one for one in openai_tools(tools, flat=True)}
    parser_tools = [one.tool for one in offered.values()]
    text = "".join(
        f'<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>'
        for name, arguments in (
            ("patch", '{"input": "a\\nb"}'),
            ("files__f", '{"x": 1}'),
            ("files__patch", '{"input": ""}'),
        )
    )
    for size in SIZES:
        answer = make_answer(StreamParser("hermes", None, parser_tools), offered=offered)
        events = streamed(answer, told(text, size))
        items = [event["item"] for event in events if event["type"] == "response.output_item.done"]
        known = [
            {name: item.get(name) for name in ("type", "name", "namespace", "input", "arguments")} for item in items
        ]
        assert known == [
            {"type": "custom_tool_call", "name": "patch", "namespace": None, "input": "a\nb", "arguments": None},
            {"type": "function_call", "name": "f", "namespace": "files", "input": None, "arguments": '{"x": 1}'},
            {"type": "custom_tool_call", "name": "patch", "namespace": "files", "input": "", "arguments": None},
        ]
        assert events[-1]["response"]["output"] == items
        inputs = [event["input"] for event in events if event["type"] == "response.custom_tool_call_input.done"]
        assert inputs == ["a\nb", ""]
