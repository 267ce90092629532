"""Every output of the corpus is read as written beside it, however it arrives, and every character is accounted for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from hypothesis import given, settings
from hypothesis import strategies as st

from branchwise.runtime.chat.tools.events import ArgumentsDelta, CallEnd, CallStart, Event, Markup

from .cases import Call, assemble

# What may be read and be neither content nor reasoning nor a call.
MARKUP = re.compile(
    r"(?:\s|<think>|</think>|\[THINK\]|\[/THINK\]|</tool_call>|<\|python_end\|>|[}\]]|</?(?:response|answer)>"
    r"|<\|(?:START|END)_(?:THINKING|RESPONSE|TEXT|ACTION)\|>|Here are my reasoning steps:"
    r"|\[(?:BEGIN|END) FINAL RESPONSE\]|</tool_calls>|<\|inner_prefix\|>|<\|tools_suffix\|>"
    r"|<\|channel>thought|<channel\|>)*"
)
# What of a call is neither its name nor its arguments: markers, and JSON's envelope.
ENVELOPE = re.compile(
    r"""(?:\s|<tool_call>|<\|python_(?:tag|start)\|>|\[TOOL_CALLS\]|\[CALL_ID\]\w{9}|\[ARGS\]|[{}\[\],:;"']"""
    r"""|name|arguments|parameters|null|type|function|id)*"""
)


def cuts(text: str) -> Iterator[list[str]]:
    """Into one, two and three pieces in every way, and into characters."""
    yield [text]
    yield list(text)
    for i in range(len(text) + 1):
        yield [text[:i], text[i:]]
        if len(text) <= 130:
            for j in range(i + 1, len(text)):
                yield [text[:i], text[i:j], text[j:]]


def check_order(events: list[Event]) -> None:
    """A client can follow: a call starts once, its arguments come while it is open, it ends before what follows."""
    is_open, index = False, -1
    for event in events:
        match event:
            case CallStart():
                assert not is_open and event.index == index + 1
                is_open, index = True, event.index
            case ArgumentsDelta() | CallEnd():
                assert is_open and event.index == index
                is_open = isinstance(event, ArgumentsDelta)
            case _:
                assert not is_open
    assert not is_open


def check_accounts(text: str, events: list[Event]) -> None:
    assert "".join(event.source for event in events) == text
    parsed = assemble(events)
    counted = len(parsed.content) + len(parsed.reasoning) + len(parsed.markup)
    assert counted + sum(len(call.source) for call in parsed.calls) == len(text)
    for event in events:
        assert not isinstance(event, Markup) or MARKUP.fullmatch(event.source), event


def test_the_whole(case) -> None:
    parsed = assemble(case.stream([case.text]))
    assert parsed.content == case.content
    assert parsed.reasoning == case.reasoning
    assert [(call.name, call.arguments, call.complete) for call in parsed.calls] == list(case.calls)


def test_however_it_is_cut(case) -> None:
    whole = case.stream([case.text])
    check_accounts(case.text, whole)
    expected = assemble(whole)
    for pieces in cuts(case.text):
        events = case.stream(pieces)
        check_order(events)
        assert assemble(events) == expected, pieces
        assert "".join(event.source for event in events) == case.text, pieces


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_random_cuts(corpus, data: st.DataObject) -> None:
    case = data.draw(st.sampled_from(corpus))
    at = sorted(data.draw(st.lists(st.integers(0, len(case.text)), max_size=20)))
    pieces = [case.text[i:j] for i, j in zip([0, *at], [*at, len(case.text)], strict=True)]
    assert assemble(case.stream(pieces)) == assemble(case.stream([case.text]))


def test_calls_hold_json_unless_they_are_cut_off(case) -> None:
    for call in assemble(case.stream([case.text])).calls:
        if call.complete or not case.text.endswith(call.source):
            json.loads(call.arguments, parse_constant=lambda constant: 1 / 0)


def test_arguments_in_json_are_the_models_own(case) -> None:
    """Where the format is JSON, what a call's source holds besides its name and arguments is the envelope."""
    if case.tools not in ("hermes", "llama3_json", "mistral") or "'" in case.text:
        return
    if case.name in ("other fields", "escapes in the name", "a bracket that does not fit") or "repaired" in case.name:
        return
    for call in assemble(case.stream([case.text])).calls:
        if call.complete and call.arguments in call.source:
            check_envelope(call)
        else:
            encoded = r"\u" in call.source or call.arguments == "{}"
            assert encoded or not call.complete, call


def check_envelope(call: Call) -> None:
    rest = call.source.replace(call.arguments, "", 1)
    rest = re.sub(rf'(?<="){re.escape(call.name)}(?=")|(?<=\]){re.escape(call.name)}(?=[\[{{])?', "", rest, count=1)
    rest = rest.replace('"abcdefghi"', "")
    assert ENVELOPE.fullmatch(rest), rest
