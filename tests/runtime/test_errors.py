"""`InvalidRequest`: a path and a problem, translated into a dialect's names."""

from __future__ import annotations

import time

import pytest

from branchwise.runtime.errors import InvalidRequest, renaming
from branchwise.runtime.messages import Refusal

NAMES = {
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
    ("path", "theirs"),
    [
        ("messages[2].role", "input[5].role"),
        ("messages[21].role", "input[40].role"),
        ("messages[2].content[0].type", "input[4].output[0].type"),
        ("messages[3].role", "input[3].role"),
        ("messages", "input"),
        ("response_format.type", "text.format.type"),
        ("tools[7].function.name", "tools[7].name"),
        ("tools[12].function.parameters.type", "tools[12].input_schema.type"),
        ("tools[1].functional", "tools[1].functional"),
        ("messages2", "messages2"),
        ("a.messages", "a.messages"),
        ("temperature", "temperature"),
        (f"tools[3].function{'.properties.a' * 6}", f"tools[3]{'.properties.a' * 6}"),
    ],
)
def test_the_longest_rule_renames_a_path_and_all_below_it(path: str, theirs: str) -> None:
    found = InvalidRequest(path, "is messages", status=413).renamed(NAMES)
    assert (found.path, found.status, str(found)) == (theirs, 413, f"{theirs} is messages")
    assert found.renamed(NAMES).path == theirs, "the client's own names stay"


def test_other_fields_of_the_sentence_are_renamed_too() -> None:
    error = InvalidRequest("max_tokens", "9 + {0} 9 = 18 tokens, got '{1}'", others=("messages",), value=9, limit=3)
    assert str(error) == "max_tokens 9 + messages 9 = 18 tokens, got '{1}'"
    theirs = error.renamed(NAMES)
    assert str(theirs) == "max_output_tokens 9 + input 9 = 18 tokens, got '{1}'"
    assert (theirs.value, theirs.limit) == (9, 3)


def test_what_was_sent_is_never_taken_for_a_placeholder() -> None:
    assert str(InvalidRequest("stop", "must be a list, got '{0} {path}'")) == "stop must be a list, got '{0} {path}'"


def test_an_error_without_a_new_name_stays_as_it_is() -> None:
    for error in (InvalidRequest(None, "the body must be at most 5 bytes"), InvalidRequest("seed", "no")):
        assert error.renamed(NAMES) is error


@pytest.mark.parametrize("text", ["messages[2].content", "messages[2].content ", "messages", "m.", "[2]", "[", "]"])
def test_a_long_path_takes_no_time(text: str) -> None:
    started = time.thread_time()
    InvalidRequest(text * 20_000, text * 20_000).renamed(NAMES)
    assert time.thread_time() - started < 5


def test_renaming_covers_what_is_raised_within() -> None:
    with pytest.raises(InvalidRequest, match=r"^input\[5\] is bad$"), renaming(NAMES):
        raise InvalidRequest("messages[2]", "is bad")


def test_a_refusal_carries_an_error_between_processes() -> None:
    error = InvalidRequest("n", "is {0}", others=("max_tokens",), value=2, limit=1, status=429, code="many")
    again = Refusal.of(error).error()
    assert vars(again) == vars(error)
