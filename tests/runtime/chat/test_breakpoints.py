"""Where breakpoints are in what a template makes of a conversation: to the letter, behind what is marked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from branchwise.runtime.chat.breakpoints import breakpoint_positions
from branchwise.runtime.chat.openai_messages import openai_turns
from branchwise.runtime.chat.openai_tools import openai_tools
from branchwise.runtime.chat.prompt import ChatPrompt
from branchwise.runtime.chat.template import ChatTemplate

TEMPLATES = Path(__file__).parent / "templates"
MARK = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
FROM_US = {"prompt_cache_breakpoint": True}


def tool(name: str, **more: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    return {"type": "function", "function": {"name": name, "description": "Say.", "parameters": parameters}, **more}


def call(arguments: Any, **more: Any) -> dict[str, Any]:
    return {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": arguments}, **more}


def parts(*texts: str, **more: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"type": "text", "text": text} for text in texts]
    found[-1] |= more
    return found


def prefixes(name: str, messages: list[Any], tools: list[Any] | None = None) -> list[tuple[str, Any]]:
    """(what comes before a mark, its ttl) of each."""
    template = ChatTemplate((TEMPLATES / name).read_text(), {"bos_token": "<s>", "eos_token": "</s>"})
    prompt = ChatPrompt(template, openai_turns(messages), openai_tools(tools), {}, True, False)
    text = prompt.text()
    return [(text[:at], breakpoint.ttl) for at, breakpoint in breakpoint_positions(prompt, text, 4)]


@pytest.mark.parametrize("name", ["qwen2.5.jinja", "qwen3.jinja", "llama3.jinja", "mistral.jinja"])
@pytest.mark.parametrize("arguments", ['{"city":  "Rome"}', {"city": "Rome"}, "{}", "{ }", "", None])
def test_a_call_stays_with_its_arguments(name: str, arguments: Any) -> None:
    messages = [
        {"role": "user", "content": "Go."},
        {"role": "assistant", "content": None, "tool_calls": [call(arguments, **MARK)]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "Gone."},
    ]
    [(before, ttl)] = prefixes(name, messages)
    assert ttl == "1h"
    assert before.rstrip().endswith('"Rome"' if arguments and "city" in arguments else "{")
    assert "Gone." not in before


@pytest.mark.parametrize("name", ["qwen2.5.jinja", "qwen3.jinja", "llama3.jinja", "mistral.jinja"])
def test_a_result_stays_with_its_text(name: str) -> None:
    messages = [
        {"role": "user", "content": "Go."},
        {"role": "assistant", "content": None, "tool_calls": [call("{}")]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": parts("Gone", "far.", **MARK)},
        {"role": "assistant", "content": "Yes."},
    ]
    [(before, _)] = prefixes(name, messages)
    assert before.endswith("far.")


@pytest.mark.parametrize("name", ["qwen2.5.jinja", "qwen3.jinja", "llama3.jinja", "mistral.jinja"])
@pytest.mark.parametrize("marked", [0, 1])
def test_a_tool_stays_with_its_definition(name: str, marked: int) -> None:
    tools = [tool("first"), tool("second")]
    tools[marked] |= FROM_US
    [(before, ttl)] = prefixes(name, [{"role": "user", "content": "Hello."}], tools)
    assert ttl is None
    assert before.count('"city"') == marked + 1, "all of it"
    assert '"first"' in before
    assert ('"second"' in before) == bool(marked), "and nothing of the next but how it begins"
    assert "Hello." not in before


def test_the_last_four_count_and_tools_come_first() -> None:
    tools = [tool("first", **FROM_US), tool("second", **FROM_US)]
    content = [{"type": "text", "text": f"{word}.", **FROM_US} for word in ("one", "two", "three")]
    found = prefixes("qwen2.5.jinja", [{"role": "user", "content": content}], tools)
    assert '"second"' in found[0][0]
    assert [before[-3:] for before, _ in found[1:]] == ["ne.", "wo.", "ee."]


def test_what_a_template_leaves_out_is_no_breakpoint() -> None:
    messages = [
        {"role": "user", "content": "Go."},
        {"role": "assistant", "content": "", "tool_calls": [call("{}", **MARK)]},
    ]
    assert prefixes("gemma.jinja", messages) == []
    assert prefixes("gemma.jinja", [{"role": "user", "content": "Go."}], [tool("first", **MARK)]) == []


def test_a_template_is_not_told_of_marks() -> None:
    """Neither beside a function nor, as in the responses API, in it."""
    nested = tool("first", **MARK, **FROM_US)
    flat = {"type": "function", **nested["function"], **MARK, **FROM_US}
    assert [offered.definition for offered in openai_tools([nested])] == [tool("first")]
    assert [offered.definition for offered in openai_tools([flat])] == [tool("first")]
