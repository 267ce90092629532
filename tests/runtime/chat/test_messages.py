"""What a chat template is given of a conversation."""

from __future__ import annotations

import json
from typing import Any

import pytest

from branchwise.runtime.chat.messages import template_messages
from branchwise.runtime.chat.openai_messages import openai_turns
from branchwise.runtime.chat.template import ChatTemplate
from branchwise.runtime.errors import InvalidRequest
from branchwise.runtime.server.http.chat.arguments import bound_arguments

PLAIN = ChatTemplate("{% for m in messages %}{{ m.role }}{{ (m.tool_calls or []) | tojson }}{% endfor %}", {})
VERBATIM = ChatTemplate(
    "{% for m in messages %}{{ m.role }}{% for c in m.tool_calls or [] %}{{ c.function.arguments if"
    " c.function.arguments is string else c.function.arguments | tojson }}{% endfor %}{% endfor %}{# developer #}",
    {},
)


def test_messages_become_what_templates_know() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a":  1}'}}
    messages: list[Any] = [
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "x": 1},
        {"role": "user", "content": "hi", "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "reasoning": "hm"},
        {"role": "tool", "content": "1", "tool_call_id": "c"},
        {"role": "assistant", "content": "ok", "tool_calls": []},
    ]
    plain = template_messages(openai_turns(messages), PLAIN)
    assert plain[0] == {"role": "system", "content": "a\nb"}
    assert plain[1] == {"role": "user", "content": "hi", "name": "Ann"}
    [made] = plain[2]["tool_calls"]
    assert made["function"] == {"name": "f", "arguments": {"a": 1}}
    assert (plain[2]["content"], plain[2]["reasoning_content"]) == ("", "hm")
    assert plain[3] == {"role": "tool", "content": "1", "tool_call_id": "c"}
    assert plain[4] == {"role": "assistant", "content": "ok"}
    verbatim = template_messages(openai_turns(messages), VERBATIM)
    assert verbatim[0]["role"] == "developer"
    assert verbatim[2]["tool_calls"][0]["function"]["arguments"] == '{"a":  1}'


@pytest.mark.parametrize("arguments", ["{", "[1]", "1", '"x"', '{"x": "\ud800"}'])
def test_arguments_that_are_no_object_are_refused_where_they_are_written_anew(arguments: str) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]
    with pytest.raises(InvalidRequest) as refused:
        template_messages(openai_turns(messages), PLAIN)
    assert refused.value.path == "messages[1].tool_calls[0].function.arguments"
    for empty in ("", " ", None, {}):
        call["function"]["arguments"] = empty  # type: ignore[index]
        assert template_messages(openai_turns(messages), PLAIN)[1]["tool_calls"][0]["function"]["arguments"] == {}


async def test_values_in_arguments_are_counted_before_any_is_made() -> None:
    """They come as text, so that the body has none of them: fifteen megabytes of lists held the loop for seconds."""

    def saying(*arguments: str) -> list[Any]:
        calls = [{"type": "function", "function": {"name": "f", "arguments": one}} for one in arguments]
        return openai_turns([{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": calls}])

    code = json.dumps({"code": "f(a, b, c, d)[0] = {1: 2}" * 100})
    half = json.dumps({"a": [[]] * 170})
    await bound_arguments(saying(code, half), PLAIN, 600)
    await bound_arguments(saying(half, half), VERBATIM, 600)
    with pytest.raises(InvalidRequest, match="at most 600 names and values in the arguments of calls") as refused:
        await bound_arguments(saying(half, code, half), PLAIN, 600)
    assert refused.value.path == "messages"
    deep = "[" * 64 + "]" * 64
    await bound_arguments(saying(deep, '{"a": "[[[["}' * 100), PLAIN, 10**6)
    with pytest.raises(InvalidRequest, match="must be nested at most 64 deep") as refused:
        await bound_arguments(saying("{}", f'{{"a": {deep}}}'), PLAIN, 10**6)
    assert refused.value.path == "messages[1].tool_calls[1].function.arguments"
