"""What changes from request to request near the front of a prompt, and where in the request reuse ends."""

from __future__ import annotations

from typing import Any

import pytest

from branchwise.runtime.chat.conversation import Conversation
from branchwise.runtime.chat.openai_messages import openai_turns
from branchwise.runtime.chat.openai_tools import openai_tools
from branchwise.runtime.chat.volatile import MAX_FOUND, part_at, volatile_parts, without_billing_header

HEADER = "x-anthropic-billing-header: cc_version=2.1.197.123; cc_entrypoint=cli; cch=0f3a9;"


def conversation(*messages: tuple[str, Any], tools: Any = None) -> Conversation:
    turns = openai_turns([{"role": role, "content": content} for role, content in messages])
    return Conversation(turns=turns, tools=openai_tools(tools))


@pytest.mark.parametrize(
    ("text", "kind", "found"),
    [
        (HEADER, "billing header", HEADER),
        ("It is 2026-11-29T07:23:36Z now.", "timestamp", "2026-11-29T07:23:36Z"),
        ("It is 2026-11-29 07:23.", "timestamp", "2026-11-29 07:23"),
        ("Started at 07:23:36.", "time", "07:23:36"),
        ("Session 01a22651-ab21-7fc1-afe8-2a4f7e9a4f21.", "UUID", "01a22651-ab21-7fc1-afe8-2a4f7e9a4f21"),
        ("Request 9f86d081884c7d659a2feaa0c55ad015.", "hash or random id", "9f86d081884c7d659a2feaa0c55ad015"),
        ("now=1795939216198", "Unix time", "1795939216198"),
    ],
)
def test_what_looks_as_if_it_changed(text: str, kind: str, found: str) -> None:
    [one] = volatile_parts(conversation(("system", text), ("user", "Hi")))
    assert (one.path, one.kind, one.text) == ("messages[0].content", kind, found)


def test_the_front_is_looked_at_and_what_stays_is_not_named() -> None:
    uuid = "01a22651-ab21-7fc1-afe8-2a4f7e9a4f21"
    tools = [{"type": "function", "function": {"name": "look", "description": f"For {uuid}."}}]
    turns = conversation(
        ("system", "Version 2.1.197, of 2026, 128000 tokens, deadbeef, feedfacefeedface."),
        ("developer", [{"type": "text", "text": "x"}, {"type": "text", "text": f"Session {uuid}"}]),
        ("user", f"Is {uuid} here?"),
        ("assistant", f"{uuid} is."),
        tools=tools,
    )
    assert [one.path for one in volatile_parts(turns)] == [
        "tools[0].function",
        "messages[1].content[1]",
        "messages[2].content",
    ]
    many = conversation(("system", " ".join([uuid] * 50)))
    assert len(volatile_parts(many)) == MAX_FOUND


def test_only_the_header_goes() -> None:
    assert without_billing_header(HEADER) == without_billing_header(HEADER + "\n") == ""
    assert without_billing_header(f"{HEADER}\nYou are Claude.") == "You are Claude."
    for text in ("", "You are Claude.", f"About {HEADER}"):
        assert without_billing_header(text) == text


def test_where_a_position_of_the_prompt_came_from() -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in ("first", "second")]
    asked = conversation(
        ("system", "Be brief."),
        ("user", [{"type": "text", "text": "One."}, {"type": "text", "text": "Two."}]),
        tools=tools,
    )
    prompt = "<system>Be brief. Tools: first, second.<user>One.Two.<assistant>"
    for text, path in (
        ("<system>", None),
        ("brief", "messages[0].content"),
        ("first", "tools[0].function"),
        ("second", "tools[1].function"),
        ("One", "messages[1].content[0]"),
        ("Two", "messages[1].content[1]"),
        ("<assistant>", "messages[1].content[1]"),
    ):
        assert part_at(asked, prompt, prompt.index(text)) == path
