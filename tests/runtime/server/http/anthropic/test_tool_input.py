"""Arguments that end anywhere, or are no JSON: what is sent is a beginning that every client can read."""

from __future__ import annotations

import json
from typing import Any

import jiter
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from branchwise.runtime.server.http.anthropic.tool_input import MAX_DEPTH, MAX_NUMBER, ToolInput

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)
OBJECTS = st.dictionaries(st.text(max_size=4), VALUES, max_size=4)


def fed(pieces: list[str]) -> tuple[str, str]:
    """(all that was passed on, the object at the end)."""
    tool_input = ToolInput()
    return "".join(tool_input.feed(piece) for piece in pieces), tool_input.text


def cut(data: st.DataObject, text: str) -> list[str]:
    at = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[i:j] for i, j in zip([0, *at], [*at, len(text)], strict=True)]


def agrees(sent: str, found: str) -> None:
    """A client that reads what it has got so far gets the object, as the package's parser does."""
    value = json.loads(found)
    assert isinstance(value, dict)
    assert (jiter.from_json(sent.encode(), partial_mode=True) if sent else {}) == value


@given(value=OBJECTS, ascii=st.booleans(), indent=st.sampled_from([None, 1]), data=st.data())
@settings(max_examples=300, deadline=None)
def test_an_object_passes_as_it_is(value: Any, ascii: bool, indent: int | None, data: st.DataObject) -> None:
    text = json.dumps(value, ensure_ascii=ascii, indent=indent)
    assert fed(cut(data, text)) == (text, text)


@given(value=OBJECTS, ascii=st.booleans(), data=st.data())
@settings(max_examples=500, deadline=None)
def test_wherever_it_ends(value: Any, ascii: bool, data: st.DataObject) -> None:
    text = json.dumps(value, ensure_ascii=ascii)
    text = text[: data.draw(st.integers(0, len(text)))]
    sent, found = fed(cut(data, text))
    assert text.startswith(sent)
    assert (sent, found) == fed([text])
    agrees(sent, found)


@given(value=OBJECTS, wrong=st.text('{}[]",:\\u019atrue \n\x00-.eE', min_size=1, max_size=6), data=st.data())
@settings(max_examples=700, deadline=None)
def test_whatever_is_wrong_in_it(value: Any, wrong: str, data: st.DataObject) -> None:
    text = json.dumps(value, ensure_ascii=data.draw(st.booleans()))
    at = data.draw(st.integers(0, len(text)))
    text = text[:at] + wrong + text[at + data.draw(st.integers(0, 2)) :]
    sent, found = fed(cut(data, text))
    assert (sent, found) == fed([text])
    assert text.lstrip().startswith(sent)
    agrees(sent, found)
    try:
        whole = jiter.from_json(text.encode(), allow_inf_nan=False)
    except ValueError:
        return
    if isinstance(whole, dict):
        assert sent == text.strip()


@pytest.mark.parametrize(
    ("text", "sent", "found"),
    [
        ("", "", "{}"),
        ("  ", "", "{}"),
        ("nul", "", "{}"),
        ('[1, "]"]', "", "{}"),
        ('"x"', "", "{}"),
        ('{"a": 129', '{"a": ', "{}"),
        ('{"a": 129,', '{"a": 129,', '{"a": 129}'),
        ('{"a": 1, "b": "half', '{"a": 1, "b": "half', '{"a": 1}'),
        ('{"a": {"b": [1, 2', '{"a": {"b": [1, ', '{"a": {"b": [1]}}'),
        ('{"a": 1} and more', '{"a": 1}', '{"a": 1}'),
        ('{"a": 1, "b": NaN}', '{"a": 1, "b": ', '{"a": 1}'),
        ('{"a": 1, "s": "\\ud83d!", "b": 2}', '{"a": 1, "s": "', '{"a": 1}'),
        ('{"s": "\\ud83d\\ude00"}', '{"s": "\\ud83d\\ude00"}', '{"s": "\\ud83d\\ude00"}'),
        ('{"a": 1, "s": "two\nlines"}', '{"a": 1, "s": "two', '{"a": 1}'),
        ('{"a" 1,, }', '{"a" ', "{}"),
        ('{"a": 1,}', '{"a": 1,', '{"a": 1}'),
    ],
)
def test_what_becomes_of_it(text: str, sent: str, found: str) -> None:
    assert fed([text]) == fed(list(text)) == (sent, found)
    agrees(sent, found)


def test_what_no_client_could_read_is_bounded() -> None:
    deep = '{"a": ' + "[" * (MAX_DEPTH + 1)
    sent, found = fed([deep])
    assert sent.count("[") == MAX_DEPTH - 1
    agrees(sent, found)
    assert fed(['{"a": 1, "b": ' + "9" * (MAX_NUMBER + 1) + "}"])[1] == '{"a": 1}'
    digits = ToolInput()
    assert "".join(digits.feed("9") for _ in '{"a": ') == ""
