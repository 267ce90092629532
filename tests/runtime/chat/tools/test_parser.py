"""The parser beyond its corpus: any text at all, promptness, cost, and its small print."""

from __future__ import annotations

import itertools
import json
import random
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from branchwise.runtime.chat.tools.events import (
    ArgumentsDelta,
    CallEnd,
    CallStart,
    ContentDelta,
    ReasoningDelta,
)
from branchwise.runtime.chat.tools.formats import TOOL_FORMATS, markers, tool_format
from branchwise.runtime.chat.tools.parser import StreamParser
from branchwise.runtime.chat.tools.reader import Markers
from branchwise.runtime.chat.tools.reasoning_formats import reasoning_format

from .cases import assemble, parse

FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "<think>", "</think>", "<|python_tag|>", "<|python_start|>", "<|python_end|>"),
    *("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<function=", "<parameter=", "</parameter>", "</function>", "[THINK]"),
    *(
        '"',
        "'",
        "\\",
        "{",
        "}",
        "[",
        "]",
        "(",
        ")",
        ":",
        ",",
        ";",
        "=",
        ">",
        "<",
        "\n",
        " ",
        "'''",
        "\\u00e9",
        "\\ud83d",
    ),
    *('{"name": "f", "arguments": ', '{"name":"g"}', '"parameters": {', "[f(a=", "f", "a", "1", "-", ".", "null"),
    *("<tool_calls>", "<TOOLCALL>", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>function<｜tool▁sep｜>", "```json"),
    *("<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>", "<|tool_call_end|>", "```tool_code", "f(a=1)"),
    *("<start_function_call>call:f{", "<escape>", "}<end_function_call>", '<invoke name="f">', "</invoke>", "```"),
    *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "<minimax:tool_call>", "</think>"),
    *("True", "\ud800", "\x00", "é", "🙂", '{"a": 1}', "\r\n"),
]
any_text = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=40).map("".join)
formats = st.sampled_from([*sorted(TOOL_FORMATS), None])
switches = st.fixed_dictionaries(
    {
        "reasoning_open": st.booleans(),
        "unknown_tools": st.sampled_from(["content", "call"]),
        "tools": st.just(None),
    }
)


def stream(pieces, tools, options) -> list:
    ids = itertools.count()
    parser = StreamParser(tools, "think", **options, new_id=lambda: f"id{next(ids)}")
    return [event for piece in pieces for event in parser.feed(piece)] + parser.finish()


def check(text: str, tools: str | None, options: dict, cuts: list[int]) -> None:
    whole = stream([text], tools, options)
    assert "".join(event.source for event in whole) == text
    at = sorted(cut % (len(text) + 1) for cut in cuts)
    pieces = [text[i:j] for i, j in zip([0, *at], [*at, len(text)], strict=True)]
    for split in (pieces, list(text)):
        events = stream(split, tools, options)
        assert assemble(events) == assemble(whole)
        assert "".join(event.source for event in events) == text


@given(text=any_text, tools=formats, options=switches, cuts=st.lists(st.integers(0, 10_000), max_size=6))
@settings(max_examples=1500, deadline=None)
def test_any_text(text: str, tools: str | None, options: dict, cuts: list[int]) -> None:
    check(text, tools, options, cuts)


@pytest.mark.parametrize("seed", range(4))
def test_outputs_with_mistakes(corpus, seed: int) -> None:
    """Every output of the corpus, a few characters or markers dropped, doubled, swapped or put in."""
    draw = random.Random(seed)
    for case in corpus:
        for _ in range(8):
            text = case.text
            for _ in range(draw.randint(1, 4)):
                i, j = sorted(draw.randint(0, len(text)) for _ in range(2))
                edit = draw.randrange(4)
                if edit == 0:
                    text = text[:i] + text[min(j, i + 3) :]
                elif edit == 1:
                    text = text[:i] + draw.choice(FRAGMENTS) + text[i:]
                elif edit == 2:
                    text = text[:j] + text[i:]
                else:
                    text = text[:i] + "".join(draw.sample(text[i:j], j - i)) + text[j:]
            tools = case.tools if draw.random() < 0.8 else draw.choice(sorted(TOOL_FORMATS))
            options = {key: value for key, value in case.options.items() if key != "tools"}
            check(text, tools, options, [draw.randint(0, 500) for _ in range(3)])


@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
        max_leaves=12,
    ),
    ascii=st.booleans(),
    indent=st.sampled_from([None, 2]),
    cut=st.integers(1, 7),
)
@settings(max_examples=300, deadline=None)
def test_arguments_come_through(value, ascii: bool, indent: int | None, cut: int) -> None:
    """Any JSON: as it is where the format is JSON; the same value from Python's literals."""
    arguments = json.dumps({"a": value}, ensure_ascii=ascii, indent=indent)
    for text, tools in (
        (f'<tool_call>\n{{"name": "f", "arguments": {arguments}}}\n</tool_call>', "hermes"),
        (f"[TOOL_CALLS]f[ARGS]{arguments}", "mistral"),
        (f'{{"name": "f", "parameters": {arguments}}}', "llama3_json"),
    ):
        events = stream([text[i : i + cut] for i in range(0, len(text), cut)], tools, {})
        assert assemble(events).calls[0].arguments == arguments
    for literal in (repr(value), json.dumps(value, ensure_ascii=ascii, indent=indent)):
        text = f"[f(a={literal})]"
        (call,) = assemble(stream([text[i : i + cut] for i in range(0, len(text), cut)], "pythonic", {})).calls
        assert call.complete and json.loads(call.arguments) == {"a": value}
    twice = json.dumps({"name": "f", "arguments": json.dumps({"a": value}, ensure_ascii=ascii)})
    assert parse(f"<tool_call>{twice}", "hermes").calls[0].arguments == json.dumps({"a": value}, ensure_ascii=ascii)


@given(value=st.text(), cut=st.integers(1, 7))
@settings(max_examples=300, deadline=None)
def test_a_string_in_tags_comes_through(value: str, cut: int) -> None:
    if re.search(r"</parameter>|<parameter=|</function>", value):
        return
    text = f"<tool_call>\n<function=f>\n<parameter=s>\n{value}\n</parameter>\n</function>\n</tool_call>"
    (call,) = assemble(stream([text[i : i + cut] for i in range(0, len(text), cut)], "qwen3_coder", {})).calls
    assert json.loads(call.arguments) == {"s": value}


LONG = "lorem ipsum, dolor; " * 20


@pytest.mark.parametrize(
    ("tools", "begin", "kind"),
    [
        ("hermes", "", ContentDelta),
        ("hermes", "<think>", ReasoningDelta),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"s": "', ArgumentsDelta),
        ("hermes", "<tool_call>{'name': 'f', 'arguments': {'s': '", ArgumentsDelta),
        ("hermes", '<tool_call>{"name": "f", "arguments": "', ArgumentsDelta),
        ("llama3_json", '<|python_tag|>{"name": "f", "parameters": {"s": "', ArgumentsDelta),
        ("glm45", "<tool_call>f\n<arg_key>s</arg_key>\n<arg_value>", ArgumentsDelta),
        ("kimi_k2", '<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"s": "', ArgumentsDelta),
        ("functiongemma", "<start_function_call>call:f{s:<escape>", ArgumentsDelta),
        ("mistral", '[TOOL_CALLS]f[ARGS]{"s": "', ArgumentsDelta),
        ("qwen3_coder", "<function=f><parameter=s>", ArgumentsDelta),
        ("pythonic", "[f(s='", ArgumentsDelta),
    ],
)
def test_nothing_is_held_back_for_nothing(tools: str, begin: str, kind: type) -> None:
    """Each character of an answer, a thought or an argument is there as soon as it was fed."""
    parser = StreamParser(tools, "think")
    parser.feed(begin + LONG[0])
    for character in LONG[1:]:
        assert [type(event) for event in parser.feed(character)] == [kind]


def test_a_call_starts_with_its_name() -> None:
    parser = StreamParser("hermes")
    assert parser.feed('<tool_call>{"name": "f') == []
    assert [type(event) for event in parser.feed('"')] == [CallStart]
    assert [type(event) for event in parser.feed(', "arguments": {"a": 1}')] == [ArgumentsDelta]
    assert [type(event) for event in parser.feed("}")] == [CallEnd]


def test_ids() -> None:
    ids = [call.id for call in parse('<tool_call>{"name": "f"}' * 100, "hermes").calls]
    assert len(set(ids)) == 100 and all(re.fullmatch(r"call_[0-9a-f]{24}", id) for id in ids)
    ids = [call.id for call in parse("[TOOL_CALLS]f[ARGS]{}" * 100, "mistral").calls]
    assert len(set(ids)) == 100 and all(re.fullmatch(r"[0-9a-zA-Z]{9}", id) for id in ids)
    assert parse("[TOOL_CALLS]f[CALL_ID]aB3dE6gH9[ARGS]{}", "mistral").calls[0].id == "aB3dE6gH9"


def test_after_the_end() -> None:
    parser = StreamParser("hermes")
    assert parser.feed("") == [] and parser.finish() == [] and parser.finish() == []
    with pytest.raises(ValueError, match="fed after finish"):
        parser.feed("x")


def test_formats_by_name() -> None:
    assert tool_format("qwen25") is tool_format("hermes")
    assert reasoning_format("deepseek_r1") is reasoning_format("think")
    with pytest.raises(ValueError, match=r"unknown tool-call format 'x'; there are .*hermes, "):
        StreamParser("x")
    with pytest.raises(ValueError, match=r"unknown reasoning format 'x'; there are .*think, "):
        StreamParser("hermes", "x")
    with pytest.raises(ValueError, match="reasoning_open needs"):
        StreamParser("hermes", reasoning_open=True)
    assert markers(tool_format("mistral"), reasoning_format("think")) == {
        *("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<think>", "</think>")
    }


def test_markers_that_contain_one_another_are_refused() -> None:
    for wrong in (["<a", "<a>"], ["b", "abc"], [""]):
        with pytest.raises(ValueError, match="contain one another"):
            Markers(wrong)


CALL = '<tool_call>{"name":"f","arguments":'
HOSTILE = {
    "text": ("hermes", "", "hello world "),
    "whitespace": ("hermes", "", " \n"),
    "marker beginnings": ("hermes", "", "<"),
    "markers cut short": ("hermes", "", "<tool_call"),
    "markers alone": ("hermes", "", "<tool_call>"),
    "calls cut short": ("hermes", "", '<tool_call>{"name": "'),
    "calls": ("hermes", "", '<tool_call>{"name":"f","arguments":{}}'),
    "thoughts": ("hermes", "", "<think></think>"),
    "ends of thoughts": ("hermes", "<think>", "\n</thin"),
    "objects": ("hermes", CALL, '{"a":'),
    "lists": ("hermes", CALL, "["),
    "escapes": ("hermes", CALL + '{"', '\\"'),
    "escapes to decode": ("hermes", CALL + '"', "\\u00e9"),
    "arguments before a name that never comes": ("hermes", '<tool_call>{"arguments":{"', '\\"'),
    "a key": ("hermes", '<tool_call>{"', "a"),
    "fields": ("hermes", '<tool_call>{"name":"f"', ',"a":1'),
    "calls in reasoning": ("hermes", "<think>", '<tool_call>{"name":"f","arguments":{}}</tool_call> and '),
    "fences": ("gemma3", "", "``"),
    "bare objects": ("llama3_json", "", '{"answer": 1} '),
    "bare lists": ("llama3_json", "", "[1, "),
    "bad calls in a list": ("mistral", "[TOOL_CALLS][", '{"name":1},'),
    "Gemma's values": ("functiongemma", "<start_function_call>call:f{", "a:<escape>b<escape>,"),
    "GLM's values": ("glm45", "<tool_call>f\n", "<arg_key>a</arg_key><arg_value>1</arg_value>"),
    "bare calls": ("llama3_json", "", '{"name":"f","parameters":{}};'),
    "lists of calls": ("mistral", "[TOOL_CALLS][", '{"name":"f"},'),
    "Python's lists": ("pythonic", "[f(a=", "["),
    "Python's items": ("pythonic", "[f(a=[", "1,"),
    "Python's dicts": ("pythonic", "[f(a=", '{"":['),
    "Python's escapes": ("pythonic", "[f(a='", "\\n"),
    "a number": ("pythonic", "[f(a=", "1"),
    "quotes": ("pythonic", "[f(a=", "'''"),
    "bare beginnings": ("pythonic", "", "[f("),
    "tag beginnings": ("qwen3_coder", "<function=f><parameter=a>", "\n<"),
    "parameters": ("qwen3_coder", "<function=f>", "<parameter=a>"),
}


def slowness() -> float:
    """How much slower a core is now than this project's machine is when idle: a loop there takes 0.22 to 0.25 s."""
    began, total = time.thread_time(), 0
    for i in range(5_000_000):
        total += i & 3
    return max(1.0, (time.thread_time() - began) / 0.25)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_megabyte_in_small_pieces(name: str) -> None:
    """Under 2 s of an idle core. What scans again what it holds would take minutes."""
    tools, begin, unit = HOSTILE[name]
    text = (begin + unit * (1_000_000 // len(unit)))[:1_000_000]
    taken = []
    for _ in range(4):  # the other core's work slows this one's, by more at some times than at others
        parser = StreamParser(tools, "think")
        before = slowness() if taken else 1.0
        began = time.thread_time()
        for i in range(0, len(text), 4):
            parser.feed(text[i : i + 4])
        parser.finish()
        taken.append((time.thread_time() - began) / before)
        if taken[-1] < 2.0:
            return
    pytest.fail(f"seconds of an idle core: {taken}")
