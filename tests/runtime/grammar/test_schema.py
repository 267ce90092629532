"""What becomes of a JSON schema before it is compiled."""

from __future__ import annotations

import json
import time
from typing import Any

import jsonschema
import pytest

from branchwise.runtime.grammar import schema

A = {"type": "object", "properties": {"a": {"type": "integer"}}}
TWO = [A, {"type": "object", "properties": {"b": {"type": "integer"}}}]


@pytest.fixture(scope="module")
def takes(compiled: Any) -> Any:
    """Whether an output may be exactly this text."""
    return compiled.take


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        (A, '{"a": 1, "b": 2}'),
        ({"type": "array", "items": A}, '[{"a": 1, "b": 2}]'),
        ({"$ref": "#/$defs/x", "$defs": {"x": A}}, '{"a": 1, "b": 2}'),
        ({"anyOf": TWO}, '{"a": 1, "c": 2}'),
        ({"properties": {"properties": A}}, '{"properties": {"a": 1, "b": 2}}'),
    ],
)
def test_an_object_that_names_its_properties_has_no_others(takes: Any, wanted: Any, text: str) -> None:
    jsonschema.validate(json.loads(text), wanted)  # valid, and not what was asked for
    assert not takes(wanted, text)
    assert takes(wanted, text.replace(', "b": 2', "").replace(', "c": 2', ""))


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        ({"type": "object"}, '{"b": 2}'),
        ({**A, "additionalProperties": True}, '{"a": 1, "b": 2}'),
        ({**A, "additionalProperties": {"type": "string"}}, '{"a": 1, "b": "2"}'),
        ({**A, "patternProperties": {"^x": {"type": "null"}}}, '{"a": 1, "x": null}'),
        ({"allOf": TWO}, '{"a": 1, "b": 2}'),
        ({"const": A}, json.dumps(A)),
    ],
)
def test_one_that_says_more_may_have_more(takes: Any, wanted: Any, text: str) -> None:
    assert takes(wanted, text)


def test_what_is_given_is_not_changed() -> None:
    text = json.dumps({"properties": {"a": A, "b": {"enum": [A]}}})
    parsed = schema.parse(text)
    assert parsed["additionalProperties"] is parsed["properties"]["a"]["additionalProperties"] is False
    assert parsed["properties"]["b"] == {"enum": [A]}
    spread = {"properties": {"a": True}, "anyOf": [{"properties": {"b": True}}, {"required": ["a"]}]}
    assert "additionalProperties" not in json.dumps(schema.parse(json.dumps(spread)))


def one_of(branches: list[Any]) -> bool:
    """Whether this ``oneOf`` is written as an ``anyOf``."""
    return "anyOf" in schema.parse(json.dumps({"oneOf": branches}))


def tagged(*tags: str, name: str = "kind", **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {name: {"enum": list(tags)}}, "required": [name]} | more


@pytest.mark.parametrize(
    ("exclusive", "branches"),
    [
        (True, [tagged("a"), tagged("b", "c"), {"type": "string"}, {"type": ["integer", "null"]}]),
        (True, [tagged("a", "b") | {"properties": {"x": {"const": "1"}, "kind": {"enum": ["a", "b"]}}}, tagged("c")]),
        (True, [tagged("a"), {"type": "array"}, {"type": "number"}]),
        (False, [tagged("a"), tagged("b"), tagged("c", "a")]),
        (False, [tagged("a"), tagged("b", name="other")]),
        (False, [tagged("a"), {"type": "object", "properties": {"kind": {"const": "b"}}}]),  # not required
        (False, [tagged("a"), {"type": ["object", "null"]}]),
        (False, [{"type": "integer"}, {"type": ["string", "number"]}]),
        (False, [tagged("a"), True]),
        (False, [tagged("a"), {"minLength": 3}]),
    ],
)
def test_branches_that_plainly_exclude_each_other(exclusive: bool, branches: list[Any]) -> None:
    assert one_of(branches) == exclusive


def test_objects_told_apart_pair_by_pair() -> None:
    """No tag is common to all three, yet each two have one."""
    pairs = [("x", "y"), ("y", "z"), ("z", "x")]
    branches = [
        {
            "type": "object",
            "properties": {first: {"const": f"{first}{i}"}, second: {"const": f"{second}{i}"}},
            "required": [first, second],
        }
        for i, (first, second) in enumerate(pairs)
    ]
    assert one_of(branches)
    assert not one_of([*branches, branches[0]])


def test_a_union_as_large_as_may_be_takes_no_time() -> None:
    """It took the GIL for eight seconds."""
    began = time.thread_time()
    assert one_of([tagged(str(i)) for i in range(1500)])
    assert not one_of([tagged(str(i), name=f"t{i % 2}") for i in range(1500)])
    assert time.thread_time() - began < 3.0
