"""Errors about a chat's fields, told in the words of the route that asked for it."""

from __future__ import annotations

import pytest

from branchwise.runtime.errors import InvalidRequest
from branchwise.runtime.http.chat.renamed import renamed

SOURCES = {
    "max_tokens": "max_output_tokens",
    "tools[].function": "tools[]",
    "tools[].function.parameters": "tools[].input_schema",
    "messages": "input",
    "messages[3]": "input[1].content[0]",
    "response_format": "text.format",
}


@pytest.mark.parametrize(
    ("field", "message", "expected_field", "expected_message"),
    [
        ("max_tokens", "max_tokens must be at least 0", "max_output_tokens", "max_output_tokens must be at least 0"),
        ("tools[12].function.name", "tools[12].function.name is no", "tools[12].name", "tools[12].name is no"),
        ("tools[1].function.parameters.type", "no", "tools[1].input_schema.type", "no"),
        ("tools[1].functional", "tools[1].functional", "tools[1].functional", "tools[1].functional"),
        ("messages[3].role", "messages[3].role must", "input[1].content[0].role", "input[1].content[0].role must"),
        ("messages[4].role", "messages[4].role must", "input[4].role", "input[4].role must"),
        ("messages", "messages has 9 tokens", "input", "input has 9 tokens"),
        (
            "messages",
            "my_messages messages[3] messages.x messages.",
            "input",
            "my_messages messages[3] messages.x input.",
        ),
        ("response_format", "x: response_format, y", "text.format", "x: text.format, y"),
        ("temperature", "temperature must be hot", "temperature", "temperature must be hot"),
    ],
)
def test_the_longest_path_that_fits_counts(
    field: str, message: str, expected_field: str, expected_message: str
) -> None:
    error = renamed(InvalidRequest(message, field=field, status=413), SOURCES)
    assert (error.field, error.message, error.status) == (expected_field, expected_message, 413)


def test_an_error_about_no_field_stays_as_it_is() -> None:
    error = InvalidRequest("the body must be at most 5 bytes", status=413)
    assert renamed(error, SOURCES) is error
