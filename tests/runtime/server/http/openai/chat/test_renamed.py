"""Errors about a chat, told to clients of other routes."""

from __future__ import annotations

import time

import pytest

from branchwise.runtime.errors import InvalidRequest
from branchwise.runtime.server.http.openai.chat.renamed import renamed

SOURCES = {
    "messages": "input",
    "messages[2]": "input[5]",
    "messages[2].content": "input[4].output",
    "messages[21]": "input[40]",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "tools[].function": "tools[]",
    "tools[].function.parameters": "tools[].input_schema",
}


@pytest.mark.parametrize(
    ("field", "message", "new_field", "new_message"),
    [
        ("messages[2].role", "messages[2].role is required", "input[5].role", "input[5].role is required"),
        ("messages[21].role", "messages[21].role is required", "input[40].role", "input[40].role is required"),
        (
            "messages[2].content[0].type",
            "messages[2].content[0].type no",
            "input[4].output[0].type",
            "input[4].output[0].type no",
        ),
        ("messages[3].role", "messages[3].role is required", "input[3].role", "input[3].role is required"),
        ("messages", "the chat template refused the messages: no", "input", "the chat template refused the input: no"),
        (
            "max_tokens",
            "messages 9 + max_tokens 9 = 18 tokens, more than 12; lower max_tokens or raise --max-model-len",
            "max_output_tokens",
            "input 9 + max_output_tokens 9 = 18 tokens, more than 12; lower max_output_tokens or raise --max-model-len",
        ),
        ("response_format.type", "response_format.type must be", "text.format.type", "text.format.type must be"),
        ("tools[7].function.name", "tools[7].function.name is no name", "tools[7].name", "tools[7].name is no name"),
        ("tools[12].function.parameters.type", "no", "tools[12].input_schema.type", "no"),
        ("tools[1].functional", "tools[1].functional", "tools[1].functional", "tools[1].functional"),
        ("tool_choice", "tool_choice names 'messages'", "tool_choice", "tool_choice names 'messages'"),
        (None, "xmessages messages2 a.messages --max_tokens", None, "xmessages messages2 a.messages --max_tokens"),
        ("temperature", "temperature must be", "temperature", "temperature must be"),
    ],
)
def test_paths_are_renamed_where_they_are_paths(
    field: str | None, message: str, new_field: str | None, new_message: str
) -> None:
    found = renamed(InvalidRequest(message, field=field, status=413), SOURCES)
    assert (found.field, found.message, found.status) == (new_field, new_message, 413)
    again = renamed(found, SOURCES)
    assert (again.field, again.message) == (new_field, new_message), "what is the client's already stays"


@pytest.mark.parametrize("text", ["messages[2].content", "messages[2].content ", "messages", "m.", "[2]"])
def test_a_long_message_takes_no_time(text: str) -> None:
    started = time.monotonic()
    renamed(InvalidRequest(text * 20_000, field=text * 20_000), SOURCES)
    assert time.monotonic() - started < 2


def test_what_is_far_within_goes_with_it() -> None:
    deep = ".properties.a" * 6
    found = renamed(
        InvalidRequest(f"tools[3].function.parameters{deep} is no", field=f"tools[3].function{deep}"), SOURCES
    )
    assert found.message == f"tools[3].input_schema{deep} is no"
    assert found.field == f"tools[3]{deep}"


def test_an_error_about_nothing_that_has_another_name_stays_as_it_is() -> None:
    for error in (InvalidRequest("the body must be at most 5 bytes", status=413), InvalidRequest("no", field="seed")):
        assert renamed(error, SOURCES) is error
