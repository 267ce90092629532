"""Grammars that derive nothing are refused before the first token; parts that do are left out where others remain."""

from __future__ import annotations

import json
import re

import pytest

from branchwise.runtime.constraint import Constraint, ConstraintError
from branchwise.runtime.grammar.compiler import GrammarCompiler
from branchwise.runtime.grammar.finite_rules import check_rules
from branchwise.runtime.grammar.llg import any_to_lark
from branchwise.runtime.grammar.schema import parse
from branchwise.runtime.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def compiler(checkpoint):
    tokenizer = Tokenizer.load(checkpoint("llama-gqa"))
    compiler = GrammarCompiler(lambda: tokenizer, tokenizer.vocab_size, (1,))
    yield compiler
    compiler.close()


def node(**properties):
    return {"type": "object", "properties": properties, "required": list(properties)}


ENDLESS = [
    ("root ::= x\nx ::= x", "rule x"),
    ('root ::= "a" x\nx ::= "c" x', "rule x"),
    ('root ::= "a" x?\nx ::= "c" x', "rule x"),
    ('root ::= x-1 | "b"\nx-1 ::= ("c" (x-1 | y))\ny ::= "d" x-1', "rule (x_1|x-1|y)"),
    ('start: "a" x\nx: "c" x', "rule x"),
    ('start: "a" x*\nx[max_tokens=5]: "c" (x | x "d")', "rule x"),
    ('start: x{2,3}\nx.5: "a" [x] x', "rule x"),
    ('start: "a" X\nX: /b/ & /c/', "X matches no text"),
    ('start: "a" | X "d"\nX: Y & /c/\nY: /[ab]+/', "X matches no text"),
    (r'start: "a" /[^\s\S]/', r"/\[\^\\s\\S\]/ matches no text"),
    ('start: "a" b\nb: %json {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}', r"\$ref #"),
    (node(a={"$ref": "#"}), r"\$ref # "),
    ({"$ref": "#"}, r"\$ref # "),
    ({"allOf": [{"$ref": "#"}]}, r"\$ref # "),
    ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, r"\$ref # "),
    ({"type": "array", "prefixItems": [{"$ref": "#"}], "minItems": 1}, r"\$ref # "),
    (
        {"$defs": {"n": node(v={"type": "string"}, next={"$ref": "#/$defs/n"})}, "$ref": "#/$defs/n"},
        r"\$ref #/\$defs/n ",
    ),
    (
        {
            "$defs": {"a": node(b={"$ref": "#/$defs/b"}), "b": node(a={"$ref": "#/$defs/a"})},
            **node(a={"$ref": "#/$defs/a"}),
        },
        r"\$ref #/\$defs/[ab] ",
    ),
    ({**node(s={"type": "string"}), "allOf": [node(a={"anyOf": [{"$ref": "#"}, {"$ref": "#"}]})]}, r"\$ref # "),
]


@pytest.mark.parametrize(("grammar", "reason"), ENDLESS, ids=[str(grammar)[:50] for grammar, _ in ENDLESS])
def test_what_derives_nothing_is_refused_and_named(compiler, grammar, reason) -> None:
    kind = "ebnf" if isinstance(grammar, str) else "json_schema"
    error = compiler.compile(Constraint.of_value(kind, grammar)).exception(10)
    assert isinstance(error, ConstraintError) and error.status == 400
    assert re.search(reason, error.problem), error.problem


FINE = [
    'root ::= "a" x\nx ::= "c" x | "d"',
    'root ::= (x | "a"{2,3} [a-z]+ y?)* "z" # c: x\nx ::= ("b" x | foo-bar)\nfoo-bar ::= "" | [^"]\ny ::= "q"',
    'root ::= object\nobject ::= "{" (pair ("," pair)*)? "}"\npair ::= "\\"k\\":" value\nvalue ::= object | "1"',
    'start: x\nx: "(" [x] ")" -> y\n// x: x\n%ignore /\\s+/\n',
    'start: "a" x~0..2\nx: "c" x?',
    "start: X y\nX: /[a-z]+/ & ~/abc/\ny: /b/ | X\n%import common.INT",
    'start: b\nb: %json {"type": "object", "properties": {"a": {"$ref": "#"}}}',
    'start: "x: x" /x: x/ y\ny: <[1-5]> | "a" y',
    node(a={"type": "array", "items": {"$ref": "#"}}),
    {"$defs": {"n": node(next={"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]})}, "$ref": "#/$defs/n"},
    {
        "$defs": {f"r{i}": node(a={"$ref": f"#/$defs/r{i + 1}"}) for i in range(90)} | {"r90": {"type": "null"}},
        "$ref": "#/$defs/r0",
    },
]


@pytest.mark.parametrize("grammar", FINE, ids=[str(grammar)[:50] for grammar in FINE])
def test_what_derives_something_is_not(compiler, grammar) -> None:
    kind = "ebnf" if isinstance(grammar, str) else "json_schema"
    error = compiler.compile(Constraint.of_value(kind, grammar)).exception(10)
    assert error is None or "special token" in str(error)


def test_an_optional_part_without_end_is_left_out() -> None:
    endless = {"$defs": {"n": node(n={"$ref": "#/$defs/n"})}, "type": "object"}
    assert parse(json.dumps({**endless, "properties": {"x": {"$ref": "#/$defs/n"}}}))["properties"] == {"x": False}
    either = parse(json.dumps({**endless, "properties": {"x": {"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]}}}))
    assert either["properties"]["x"]["anyOf"] == [False, {"type": "null"}]


def test_a_large_grammar_is_checked_quickly() -> None:
    """Chains in any order, which a naive fixpoint would go over thousands of times."""
    import random
    import time

    lines = [f'r{i}: "a" r{i + 1}' for i in range(6000)]
    for order in (lines, lines[::-1], random.Random(0).sample(lines, len(lines))):
        began = time.thread_time()
        check_rules(any_to_lark("\n".join(["start: r0", *order, 'r6000: "x"'])))
        assert time.thread_time() - began < 20
