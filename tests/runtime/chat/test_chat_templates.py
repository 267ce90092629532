"""Chat templates: equal to transformers' rendering for every family, and bounded whatever a checkpoint brings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from branchwise.runtime.chat.template import ChatTemplate
from branchwise.runtime.errors import InvalidRequest, LoadError
from branchwise.runtime.models.folder import SHIPPED

FOLDER = Path(__file__).parent / "templates"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
SOURCES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.jinja"))}
SOURCES["shipped"] = json.loads((SHIPPED / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]

SYSTEM = {"role": "system", "content": " You are terse. \n"}
TURNS = [
    {"role": "user", "content": "  <b>Hi</b> & \"hello\" 'there' 你好 \\n "},
    {"role": "assistant", "content": "Yes?\n"},
    {"role": "user", "content": "Name a tree."},
]
CALL = {
    "type": "function",
    "id": "abcdefghi",
    "function": {"name": "look_up", "arguments": {"name": "Ada é", "n": 1.5}},
}
WITH_CALL = [
    *TURNS,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"found": [1, 2]}', "tool_call_id": "abcdefghi", "name": "look_up"},
]
THOUGHT = {"role": "assistant", "content": "An oak.", "reasoning_content": "\nTrees: oak, elm.\n"}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": TURNS[:1],
    "system": [SYSTEM, TURNS[0]],
    "turns": TURNS,
    "system and turns": [SYSTEM, *TURNS],
    "open answer": [*TURNS, {"role": "assistant", "content": " An oak "}],
    "call": WITH_CALL,
    "answer to a call": [SYSTEM, *WITH_CALL, {"role": "assistant", "content": "Found <it>."}],
    "two calls": [TURNS[0], {"role": "assistant", "content": "So:", "tool_calls": [CALL, CALL]}, *WITH_CALL[-1:] * 2],
    "thinking": [TURNS[0], THOUGHT, TURNS[2], THOUGHT],
    "thinking inside": [TURNS[0], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."}, TURNS[2]],
    "arguments as text": [
        TURNS[0],
        {
            "role": "assistant",
            "tool_calls": [{**CALL, "function": {"name": "f", "arguments": '{"a":  1}'}}],
            "content": "",
        },
    ],
    "unknown role": [TURNS[0], {"role": "judge", "content": "Order!"}],
    "wrong order": [TURNS[1], TURNS[0]],
    "twice": [TURNS[0], TURNS[2]],
    "nothing said": [{"role": "user", "content": ""}],
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Looks a 'name' up <here> & \"there\".",
            "parameters": {
                "type": "object",
                "properties": {"name": {"type": "string", "enum": ["a", "é"]}},
                "required": [],
            },
        },
    },
    {"type": "function", "function": {"name": "now", "description": "The time.", "parameters": {"type": "object"}}},
]


def theirs(source: str, messages: list[dict[str, Any]], tools: Any, add: bool, final: bool, **more: Any) -> str | None:
    """transformers' rendering, or None where the template refuses."""
    try:
        texts, _ = render_jinja_template(
            [messages],
            tools=tools,
            chat_template=source,
            add_generation_prompt=add,
            continue_final_message=final,
            **SPECIAL,
            **more,
        )
    except Exception:
        return None
    return str(texts[0])


@pytest.mark.parametrize("family", SOURCES)
@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["bare", "tools"])
def test_renderings_are_those_of_transformers(family: str, name: str, tools: Any) -> None:
    source, messages = SOURCES[family], CONVERSATIONS[name]
    template = ChatTemplate(source, SPECIAL)
    for add, final, more in (
        (True, False, {}),
        (False, False, {}),
        (False, True, {}),
        (True, False, {"enable_thinking": False, "date_string": "1 Jan 2026", "tools_in_user_message": False}),
    ):
        expected = theirs(source, messages, tools, add, final, **more)
        try:
            text = template.render(messages, add, {"tools": tools, **more}, final)
        except InvalidRequest:
            text = None
        assert text == expected


def test_the_families_render_most_conversations() -> None:
    """The test above would pass if every template refused everything."""
    counts = {
        family: sum(theirs(source, messages, None, True, False) is not None for messages in CONVERSATIONS.values())
        for family, source in SOURCES.items()
    }
    assert min(counts.values()) >= 6, counts
    assert sum(counts.values()) >= 80, counts


def test_arguments_stay_as_they_were_written_where_the_template_allows() -> None:
    kept = {family for family, source in SOURCES.items() if ChatTemplate(source, SPECIAL).probes.keeps_arguments}
    assert kept == {"qwen3", "shipped", "kimi", "deepseek_v31", "apertus", "granite"}


def test_what_a_template_reads() -> None:
    template = ChatTemplate(SOURCES["qwen3"], SPECIAL)
    assert template.reads("enable_thinking")
    assert not template.reads("date_string")
    assert not template.reads("messages")
    assert not template.reads("ns"), "set by the template itself"
    assert template.writes_tools
    assert not ChatTemplate(SOURCES["gemma"], SPECIAL).writes_tools
    assert not ChatTemplate(SOURCES["gemma"], SPECIAL).reads("bos_token")


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10 ** 9 }}",
        "{{ 10 ** 9 * 'a' }}",
        "{{ [1] * 10 ** 9 }}",
        "{{ 2 ** 1000000000 }}",
        "{% set ns = namespace(x=3 ** 99) %}{% for i in range(9999) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{{ 'a' | center(10 ** 9) }}",
        "{{ 'a'.ljust(10 ** 9) }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '%*d' % (999999999, 1) }}",
        "{{ '%999999999d' | format(1) }}",
        "{{ '{:999999999}'.format(1) }}",
        "{{ '{:{}}'.format(1, 999999999) }}",
        "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
        "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
        "{{ (['a' * 1000000] * 10000) | join }}",
        "{{ ''.join(['a' * 1000000] * 10000) }}",
        "{{ ([1] * 100000) | join('b' * 100000) }}",
        "{{ [1] | batch(10 ** 9, 1) | list }}",
        "{% set x %}{% for i in range(99999) %}{{ messages[0].content }}{% endfor %}{% endset %}",
        "{% macro f() %}{{ messages[0].content * 9999 }}{% endmacro %}{% for i in range(999) %}{{ f() }}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{{ ''.join(range(99999) | map('string')) | length }}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(50) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ lipsum(n=100000) }}",
        "{% for x in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_no_template_takes_more_than_its_share(source: str) -> None:
    template = ChatTemplate(source, SPECIAL)
    with pytest.raises(InvalidRequest, match="the chat template") as refused:
        template.render([{"role": "user", "content": "x" * 1000}], True, {}, seconds=0.5)
    assert len(refused.value.message) < 500
    assert refused.value.path == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ dict.__init__.__globals__ }}",
        "{{ dict.mro() }}",
        "{{ namespace(_x=1) }}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "{{ raise_exception.__globals__ }}",
        "{{ raise_exception('no: ' ~ messages[0].role) }}",
        "{% include 'x' %}",
    ],
)
def test_the_sandbox_lets_nothing_out(source: str) -> None:
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(InvalidRequest):
        text = ChatTemplate(source, SPECIAL).render(messages, True, {})
        if not text.strip():  # an undefined attribute renders as nothing
            raise InvalidRequest(None, "nothing")
    assert messages == [{"role": "user", "content": "x"}]


def test_a_template_that_is_none() -> None:
    with pytest.raises(LoadError, match="line 1"):
        ChatTemplate("{% for %}", SPECIAL).render([{"role": "user", "content": "x"}], True, {})


def test_one_rendering_after_another_and_at_once() -> None:
    """The budget belongs to one rendering."""
    from concurrent.futures import ThreadPoolExecutor

    template = ChatTemplate(SOURCES["qwen3"], SPECIAL)
    expected = template.render(TURNS, True, {})
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: template.render(TURNS, True, {}), range(200))) == {expected}
