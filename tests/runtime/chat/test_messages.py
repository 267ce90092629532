"""What a chat template is given of a conversation."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from branchwise.runtime.chat.conversation import Conversation
from branchwise.runtime.chat.messages import template_messages
from branchwise.runtime.chat.openai_messages import openai_turns
from branchwise.runtime.chat.openai_tools import openai_tools
from branchwise.runtime.chat.prompt import chat_prompt
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


# -- how parts and turns join ------------------------------------------------------------------------------------------

# As the models' own templates do it, without what else is in them.
GEMMA3 = """{%- if messages[0]['role'] == 'system' -%}
  {%- if messages[0]['content'] is string -%}{%- set prefix = messages[0]['content'] + '\n\n' -%}
  {%- else -%}{%- set prefix = messages[0]['content'][0]['text'] + '\n\n' -%}{%- endif -%}
  {%- set rest = messages[1:] -%}
{%- else -%}{%- set prefix = '' -%}{%- set rest = messages -%}{%- endif -%}
{%- for m in rest -%}
  {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}
    {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
  {%- endif -%}
  {{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + (prefix if loop.first else '') }}
  {%- if m['content'] is string -%}{{ m['content'] | trim }}
  {%- else -%}{%- for item in m['content'] -%}{%- if item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
  {%- endfor -%}{%- endif -%}{{ '<end_of_turn>\n' }}
{%- endfor -%}"""
MISTRAL_SMALL = """{%- macro write(content) -%}{%- if content is string -%}{{ content }}{%- else -%}
{%- for block in content -%}{{ block['text'] }}{%- endfor -%}{%- endif -%}{%- endmacro -%}
{%- for m in messages -%}
  {%- if m['role'] == 'user' -%}[INST]{{ write(m['content']) }}[/INST]
  {%- elif m['role'] == 'system' -%}[SYSTEM_PROMPT]{{ write(m['content']) }}[/SYSTEM_PROMPT]
  {%- else -%}{{ write(m['content']) }}</s>{%- endif -%}
{%- endfor -%}"""
QWEN35 = """{%- for m in messages -%}
{%- if m.role == 'system' and not loop.first -%}
{{ raise_exception('System message must be at the beginning.') }}{%- endif -%}
<|im_start|>{{ m.role }}
{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif -%}
<|im_end|>
{% endfor %}"""
PARTLESS = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}"
BY_NAME = {"gemma3": GEMMA3, "mistral small": MISTRAL_SMALL, "qwen3.5": QWEN35, "partless": PARTLESS}


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def rendered(source: str, *messages: Any) -> str:
    template = ChatTemplate(source, {})
    return template.render(template_messages(openai_turns(messages), template), False, {})


@pytest.mark.parametrize("name", ["gemma3", "mistral small", "qwen3.5"])
def test_text_parts_join_as_the_template_joins_them(name: str) -> None:
    """Equal to transformers, which hands templates the lists as they are."""
    messages = [{"role": "user", "content": parts("See ", "this: ", "x")}, {"role": "assistant", "content": parts("a")}]
    [theirs], _ = render_jinja_template([messages], chat_template=BY_NAME[name])
    assert rendered(BY_NAME[name], *messages) == theirs


def test_a_template_that_reads_no_parts_gets_lines() -> None:
    assert rendered(PARTLESS, {"role": "user", "content": parts("a", "b")}) == "<user>a\nb"


def test_parts_that_a_template_would_drop_are_joined_too() -> None:
    """Gemma 3 writes only the first part of a system message."""
    system = {"role": "system", "content": parts("One. ", "Two.")}
    assert "One. Two.\n\nHi" in rendered(GEMMA3, system, {"role": "user", "content": "Hi"})


@pytest.mark.parametrize("name", BY_NAME)
def test_neighbouring_system_messages_are_one(name: str) -> None:
    """``developer`` is the same role to these templates."""
    system = [{"role": "system", "content": "One."}, {"role": "developer", "content": parts("Two.", "Three.")}]
    text = rendered(BY_NAME[name], *system, {"role": "user", "content": "Hi"})
    assert text.count("One.\n\nTwo.") == 1
    assert text.count("Three.") == text.count("Hi") == 1


@pytest.mark.parametrize("name", BY_NAME)
def test_what_coding_agents_send_is_rendered_by_every_template(name: str) -> None:
    """Claude Code ends with a system message; Codex begins with two developer and two user messages."""
    user, system = {"role": "user", "content": "Hi"}, {"role": "system", "content": "Agents: none."}
    developer = {"role": "developer", "content": "Be brief."}
    context = {"role": "user", "content": "It is Sunday."}
    for messages in ([user, system], [developer, developer, context, user], [developer, context, SAID, user, system]):
        text = rendered(BY_NAME[name], *messages)
        at = [text.rindex(str(message["content"])) for message in messages]
        assert at == sorted(at)


SAID = {"role": "assistant", "content": "Yes?"}


def test_turns_stay_apart_where_the_template_takes_them() -> None:
    two = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    assert rendered(PARTLESS, *two) == "<user>a<user>b"
    late = [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]
    assert rendered(PARTLESS, *late) == "<user>a<system>b"
    assert rendered(QWEN35, *late).count("<|im_start|>user") == 2
    assert rendered(GEMMA3, *late) == "<start_of_turn>user\na\n\nb<end_of_turn>\n"


def test_a_checkpoints_template_for_tools_is_used_with_tools() -> None:
    """Hermes 2 and 3 have one named ``tool_use``; transformers takes it when tools are given."""
    template = ChatTemplate("plain", {}, "{% for t in tools %}{{ t.function.name }}{% endfor %}")
    tools = openai_tools([{"type": "function", "function": {"name": "look"}}])
    turns = openai_turns([{"role": "user", "content": "x"}])
    assert chat_prompt(template, Conversation(turns=turns)).text() == "plain"
    assert chat_prompt(template, Conversation(turns=turns, tools=tools)).text() == "look"
    with pytest.raises(InvalidRequest, match="tools are not supported"):
        chat_prompt(ChatTemplate("plain", {}), Conversation(turns=turns, tools=tools))


def test_tools_are_functions_alone_where_the_template_reads_them_so() -> None:
    """Apertus's template adds ``tool.description`` to text: chat completions' object around the function ends it."""
    flat = ChatTemplate("{% for t in tools or [] %}{{ '// ' + t.description + ' ' + t.name }}{% endfor %}", {})
    nested = ChatTemplate("{% for t in tools or [] %}{{ t.function.name }}{% endfor %}", {})
    tools = openai_tools([{"type": "function", "function": {"name": "look", "description": "d"}}])
    conversation = Conversation(turns=openai_turns([{"role": "user", "content": "x"}]), tools=tools)
    assert chat_prompt(flat, conversation).text() == "// d look"
    assert chat_prompt(nested, conversation).text() == "look"


GPT_OSS = (
    "{% for m in messages %}{% if m.tool_calls and m.content and m.thinking %}{{ raise_exception('both') }}{% endif %}"
    "<{{ m.role }}>{{ m.thinking or '' }}|{{ m.content }}{% endfor %}"
)


def test_thinking_and_text_of_a_call_are_one_where_the_template_refuses_both() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    turn = {"role": "assistant", "content": "Let me look.", "reasoning_content": "Hm.", "tool_calls": [call]}
    user = {"role": "user", "content": "x"}
    assert rendered(GPT_OSS, user, turn) == "<user>|x<assistant>Hm.\n\nLet me look.|"
    assert rendered(GPT_OSS.replace("m.tool_calls and", "false and"), user, turn).endswith("Hm.|Let me look.")
    del turn["tool_calls"]
    assert rendered(GPT_OSS, user, turn).endswith("Hm.|Let me look.")


def test_text_in_a_templates_own_braces_is_no_argument_kept() -> None:
    """Gemma 4's template writes ``call:NAME{`` and ``}`` around arguments that are text, which JSON has already."""
    source = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ '{' ~ c.function.arguments ~ '}' }}{% endfor %}"
    )
    assert not ChatTemplate(source + "{% endfor %}", {}).probes.keeps_arguments
    assert VERBATIM.probes.keeps_arguments


ONE_CALL = (
    "{% for m in messages %}{% if m.tool_calls %}REFUSE{% set call = m.tool_calls[0].function %}"
    "{{ m.thinking or '' }}>{{ call.name }}{{ call.arguments | tojson }}{% else %}<{{ m.content }}{% endif %}"
    "{% endfor %}"
)
SINGLE = "{% if m.tool_calls | length > 1 %}{{ raise_exception('only single tool-calls') }}{% endif %}"


@pytest.mark.parametrize("refuse", ["", SINGLE])
def test_calls_of_one_turn_are_turns_where_the_template_writes_one(refuse: str) -> None:
    """GPT-OSS's writes the first, and its name above every result; Llama 3's refuses the second."""
    source = ONE_CALL.replace("REFUSE", refuse)
    assert not ChatTemplate(source, {}).probes.writes_all_calls and PLAIN.probes.writes_all_calls
    calls = [{"id": f"c{i}", "type": "function", "function": {"name": f"f{i}", "arguments": "{}"}} for i in range(3)]
    results = [{"role": "tool", "content": f"r{i}", "tool_call_id": f"c{i}"} for i in (1, 0, 2)]
    turn = {"role": "assistant", "content": "", "reasoning_content": "Hm.", "tool_calls": calls}
    user = {"role": "user", "content": "x"}
    assert rendered(source, user, turn, *results, user) == "<xHm.>f0{}<r0>f1{}<r1>f2{}<r2<x"
    assert rendered(source, user, turn, results[0], user) == "<xHm.>f0{}>f1{}<r1>f2{}<x"
    assert rendered(source, user, turn) == "<xHm.>f0{}>f1{}>f2{}"
    assert rendered(source, user, turn | {"tool_calls": calls[:1]}, *results[1:]) == "<xHm.>f0{}<r0<r2"
