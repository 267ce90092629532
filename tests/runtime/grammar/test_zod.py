"""What zod 4 writes for common types: accepted, and enforced as zod checks it."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from branchwise.runtime.constraint import Constraint
from branchwise.runtime.grammar.compiler import GrammarCompiler
from branchwise.runtime.grammar.patterns import _KNOWN, without_lookahead
from branchwise.runtime.tokenizer.tokenizer import Tokenizer

EMAIL, DURATION = _KNOWN
SCHEMAS = {
    "email": {"type": "string", "format": "email", "pattern": EMAIL},
    "iso.duration": {"type": "string", "format": "duration", "pattern": DURATION},
    "int": {"type": "integer", "minimum": -9007199254740991, "maximum": 9007199254740991},
    "never": {"type": "object", "properties": {"x": {"not": {}}}, "additionalProperties": False},
    "ipv4": {"type": "string", "format": "ipv4", "pattern": r"^(?:(?:25[0-5]|1[0-9][0-9]|[0-9])\.){3}[0-9]$"},
    "optional": {"type": "object", "properties": {"a": {"type": "string"}, "b": {"not": {}, "description": "no"}}},
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_type_compiles(checkpoint, name: str) -> None:
    tokenizer = Tokenizer.load(checkpoint("llama-gqa"))
    compiler = GrammarCompiler(lambda: tokenizer, tokenizer.vocab_size, (1,))
    assert compiler.compile(Constraint("json_schema", json.dumps(SCHEMAS[name]))).exception(10) is None
    compiler.close()


@given(text=st.text(".a@-'_+B9", max_size=12) | st.from_regex(r"[a.']{0,5}@([ab-]\.){1,3}cd", fullmatch=True))
@settings(max_examples=3000, deadline=None)
def test_an_email_is_zods(text: str) -> None:
    (pattern,) = without_lookahead(EMAIL) or []
    assert bool(re.fullmatch(pattern, text)) == bool(re.fullmatch(EMAIL, text))


@given(
    text=st.text("PTYMDHSW1.,", max_size=10)
    | st.from_regex(r"P(1[YMDW]){0,3}(T(1[HM]){0,2}(1(.1)?S)?)?", fullmatch=True)
)
@settings(max_examples=3000, deadline=None)
def test_a_duration_is_zods(text: str) -> None:
    (pattern,) = without_lookahead(DURATION) or []
    assert bool(re.fullmatch(pattern, text)) == bool(re.fullmatch(DURATION, text))
