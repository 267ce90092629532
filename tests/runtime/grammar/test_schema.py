"""What becomes of a JSON schema before it is compiled."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from branchwise.runtime.grammar import schema
from branchwise.runtime.grammar.constraint import Constraint
from branchwise.runtime.grammar.llg import Backend
from branchwise.runtime.model_folder import SHIPPED
from branchwise.runtime.tokenizer import Tokenizer

A = {"type": "object", "properties": {"a": {"type": "integer"}}}
TWO = [A, {"type": "object", "properties": {"b": {"type": "integer"}}}]


@pytest.fixture(scope="module")
def takes() -> Any:
    """Whether an output may be exactly this text."""
    tokenizer = Tokenizer.load(SHIPPED)
    backend = Backend(tokenizer, tokenizer.vocab_size, [2, 0])

    def walk(wanted: Any, text: str) -> bool:
        matcher = backend.compile(Constraint("json_schema", json.dumps(wanted)))
        ids = tokenizer.encode(text, add_special_tokens=False).tolist()
        return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())

    return walk


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
