"""What cannot be enforced is refused with the reason, and what could be told to look away is not."""

from __future__ import annotations

import json
import re

import pytest

from branchwise.runtime.constraint import MAX_BYTES, MAX_CHOICES, Constraint, ConstraintError
from branchwise.runtime.errors import InvalidRequest
from branchwise.runtime.grammar.compiler import GrammarCompiler
from branchwise.runtime.grammar.schema import MAX_DEPTH, MAX_VALUES
from branchwise.runtime.sampling_params import SamplingParams, validate
from branchwise.runtime.tokenizer.tokenizer import Tokenizer


def nested(depth):
    schema: object = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return json.dumps(schema)


def chain(rules):
    lines = [f'r{i} ::= "a" r{i + 1}' for i in range(rules)]
    return "\n".join([*lines, f'r{rules} ::= "x"', "root ::= r0"])


REFUSED = [
    ("json_schema", '{"not": {"type": "string"}}', "uses not"),
    ("json_schema", '{"type": "array", "contains": {"type": "string"}}', "uses contains"),
    ("json_schema", '{"type": "array", "uniqueItems": true}', "uses uniqueItems"),
    ("json_schema", '{"if": {"type": "string"}, "then": {"minLength": 1}}', "uses if"),
    ("json_schema", '{"dependentRequired": {"a": ["b"]}}', "uses dependentRequired"),
    ("json_schema", '{"propertyNames": {"format": "date"}}', "uses propertyNames"),
    ("json_schema", '{"oneOf": [{"type": "string"}, {"maxLength": 3}]}', "oneOf.*anyOf"),
    ("json_schema", '{"oneOf": [{"type": "integer"}, {"type": "number"}]}', "oneOf.*anyOf"),
    ("json_schema", '{"type": "string", "pattern": "(?=a)b"}', "look-around"),
    ("json_schema", '{"$ref": "http://example.com/schema"}', "example.com"),
    ("json_schema", '{"type": "integer", "minimum": 5, "maximum": 3}', "greater than maximum"),
    ("json_schema", '{"type": "nonsense"}', "nonsense"),
    ("json_schema", '{"x-guidance": {"lenient": true}, "not": {}}', "x-guidance"),
    ("json_schema", '{"items": {"x-guidance": {"lenient": true}, "not": {}}}', "x-guidance"),
    ("json_schema", "{'a': 1}", "not valid JSON"),
    ("json_schema", "[]", "must be a JSON object"),
    ("json_schema", "false", "schema is false"),
    ("json_schema", nested(MAX_DEPTH), f"at most {MAX_DEPTH} levels"),
    ("json_schema", json.dumps({"enum": list(range(MAX_VALUES))}), f"at most {MAX_VALUES} values"),
    ("regex", "(?!x)y", "look-around"),
    ("regex", "[a", "unclosed"),
    ("regex", r"(a)\1", "backreferences"),
    ("ebnf", 'root ::= "a" missing', "missing"),
    ("ebnf", "nothing at all", "is not a grammar"),
    ("ebnf", "root ::= " + "(" * 300 + '"a"' + ")" * 300, "nested brackets"),
    ("ebnf", chain(5000), "has 5002 rules in [0-9]+ characters"),  # it took the GIL for 19 seconds
]


@pytest.fixture(scope="module")
def compiler(checkpoint):
    tokenizer = Tokenizer.load(checkpoint("llama-gqa"))
    compiler = GrammarCompiler(lambda: tokenizer, tokenizer.vocab_size, (1,))
    yield compiler
    compiler.close()


@pytest.mark.parametrize(("kind", "text", "reason"), REFUSED, ids=[f"{k}-{t[:40]}" for k, t, _ in REFUSED])
def test_refused_with_the_reason(compiler, kind, text, reason):
    error = compiler.compile(Constraint(kind, text)).exception(10)
    assert isinstance(error, ConstraintError)
    assert error.status == 400
    assert re.search(reason, error.problem), error.problem
    assert "\n" not in error.problem and len(error.problem) < 600


def test_a_grammar_of_many_rules_compiles(compiler):
    assert compiler.compile(Constraint("ebnf", chain(600))).exception(10) is None


def test_a_schema_at_the_limit_of_depth_compiles(compiler):
    assert compiler.compile(Constraint("json_schema", nested(MAX_DEPTH - 1))).exception(10) is None


def test_names_that_look_like_keywords_are_names(compiler):
    schema = {"type": "object", "properties": {"oneOf": {"type": "string"}, "not": {"const": {"x-guidance": 1}}}}
    assert compiler.compile(Constraint("json_schema", json.dumps(schema))).exception(10) is None


@pytest.mark.parametrize(
    ("fields", "field", "problem"),
    [
        ({"regex": "a", "ebnf": "b"}, "regex", "cannot be combined with ebnf"),
        ({"regex": ""}, "regex", "must not be empty"),
        ({"regex": 7}, "regex", "must be a string, got int"),
        ({"regex": "a" * (MAX_BYTES + 1)}, "regex", f"at most {MAX_BYTES} bytes"),
        ({"regex": "\ud800"}, "regex", "Unicode"),
        ({"json_schema": 3}, "json_schema", "must be a string"),
        ({"json_schema": {"a": {1, object}}}, "json_schema", "valid JSON"),
        ({"json_schema": "x" * 100_000, "n": 128}, "json_schema", "times n"),
        ({"choices": ()}, "choices", "not empty"),
        ({"choices": ("a", "")}, "choices", "non-empty"),
        ({"choices": ("a", 3)}, "choices", "non-empty strings"),
        ({"choices": ("a",) * (MAX_CHOICES + 1)}, "choices", f"at most {MAX_CHOICES}"),
    ],
)
def test_bounds(fields, field, problem):
    with pytest.raises(InvalidRequest, match=problem) as caught:
        validate(SamplingParams(**fields), 100)
    assert caught.value.path == field


def test_one_compilation_serves_all_who_ask_and_memory_is_bounded(checkpoint):
    tokenizer = Tokenizer.load(checkpoint("llama-gqa"))
    compiler = GrammarCompiler(lambda: tokenizer, tokenizer.vocab_size, (1,), cache_bytes=200_000)
    first = compiler.compile(Constraint("regex", "a0"))
    assert compiler.compile(Constraint("regex", "a0")) is first
    refused = compiler.compile(Constraint("regex", "["))
    assert compiler.compile(Constraint("regex", "[")) is refused and refused.exception(10) is not None
    first.result(100)
    assert compiler.compiled == 2
    for i in range(1, 10):
        compiler.compile(Constraint("regex", f"a{i}")).result(100)
        assert compiler.compile(Constraint("regex", "[")) is refused  # used all the time: stays
        assert compiler.cached_bytes <= 200_000
    assert compiler.compile(Constraint("regex", "a9")) is compiler.compile(Constraint("regex", "a9"))
    assert compiler.compile(Constraint("regex", "a0")) is not first  # was let go
    compiler.close()
