"""Keywords that llguidance does not enforce: those without effect are accepted, others rewritten or refused by path."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest

from branchwise.runtime.constraint import ConstraintError
from branchwise.runtime.grammar.patterns import matched_names, matches_only, without_lookahead

INTEGER = {"type": "integer"}
A = {"type": "object", "properties": {"a": INTEGER}, "required": ["a"], "additionalProperties": False}
CHECKER = jsonschema.Draft202012Validator.FORMAT_CHECKER


@pytest.mark.parametrize("seed", range(4))
def test_every_output_of_hard_schemas_goes_on_until_it_is_valid(compiled: Any, generated: Any, seed: int) -> None:
    """No request fails after its first token: a schema is refused at once, or every output of it can be completed."""
    served = ended = 0
    for schema in generated.hard(120, seed=100 + seed):
        try:
            grammar = compiled.compile(schema)
        except ConstraintError:
            continue
        served += 1
        for walk in range(3):
            text = compiled.write(grammar, walk)
            if text is not None:
                ended += 1
                jsonschema.Draft202012Validator(schema, format_checker=CHECKER).validate(json.loads(text))
    assert served >= 60 and ended >= 2 * served


PATTERNED = {**A, "required": ["a"], "patternProperties": {"^a$": INTEGER}}


@pytest.mark.parametrize(
    "schema",
    [
        PATTERNED,
        {**PATTERNED, "patternProperties": {"^a{1}$": True}},
        {**PATTERNED, "patternProperties": {"^(a|b)$": INTEGER}, "properties": {"b": INTEGER, "a": INTEGER}},
        {**PATTERNED, "patternProperties": {"^a$": {"minimum": 7}, "^b+$": {"type": "null"}}},
        {"type": "object", "properties": {'a"b': True, "größe": True}, "patternProperties": {'^(a"b|größe)$': INTEGER}},
        {"type": "array", "items": PATTERNED, "minItems": 2},
        {"$ref": "#/$defs/p", "$defs": {"p": PATTERNED}},
        {"anyOf": [PATTERNED, {"type": "null"}]},
        # names that are only required, or declared by another schema of the same object
        {**PATTERNED, "properties": {}},
        {**PATTERNED, "properties": {"b": INTEGER}, "required": ["a"]},
        {**PATTERNED, "properties": {}, "required": ["b", "c"], "patternProperties": {"^[bc]$": INTEGER}},
        {**PATTERNED, "properties": {}, "maxProperties": 3},
        {**PATTERNED, "properties": {}, "minProperties": 1},
        {"allOf": [{**A, "additionalProperties": True}, {**PATTERNED, "properties": {}, "required": []}]},
        {**PATTERNED, "properties": {}, "required": [], "$ref": "#/$defs/a", "$defs": {"a": {"required": ["a"]}}},
    ],
)
def test_patterns_that_match_declared_names_only(compiled: Any, schema: Any) -> None:
    grammar, ended = compiled.compile(schema), 0
    for seed in range(40):
        text = compiled.write(grammar, seed)
        if text is not None:
            ended += 1
            jsonschema.validate(json.loads(text), schema)
    assert ended > 20


def test_many_patterns_and_names_are_refused_at_once(compiled: Any) -> None:
    """Comparing each pattern with each name took a minute, holding the GIL."""
    names = [f"k{i}" for i in range(2800)]
    schema = {"properties": dict.fromkeys(names, True), "patternProperties": {f"^q{i}$": True for i in range(2800)}}
    with pytest.raises(ConstraintError, match="2800 patterns beside 2800 property names"):
        compiled.compile(schema)


def test_a_dropped_pattern_still_binds_its_property(compiled: Any) -> None:
    schema = {**A, "patternProperties": {"^a$": {"minimum": 7}}}
    assert compiled.take(schema, '{"a": 8}') and not compiled.take(schema, '{"a": 6}')


def test_which_names_a_pattern_matches() -> None:
    assert matched_names("^a", ["a", "ab", "ba", 'a"']) == ["a", "ab", 'a"']
    assert matched_names("[", ["a"]) == []
    for pattern, names, only in [
        ("^a$", ["a"], True),
        ("^[ab]$", ["a", "b"], True),
        ("^[ab]$", ["a"], False),
        ("a", ["a"], False),
        ("^a$|^b$", ["a"], False),
        ("^a{2}$", ["aa"], True),
        ("^a$", [], False),
    ]:
        assert matches_only(pattern, names) == only, (pattern, names)


MAP = {"type": "object", "additionalProperties": INTEGER}
LIST = {"type": "array", "items": INTEGER}


@pytest.mark.parametrize(
    ("schema", "more", "text"),
    [
        (MAP, {"propertyNames": {"type": "string"}}, '{"b": 1}'),  # every record of zod 4
        (MAP, {"propertyNames": {"title": "Name"}}, '{"b": 1}'),
        (MAP, {"propertyNames": True}, '{"b": 1}'),
        (LIST, {"uniqueItems": False}, "[1, 1]"),
        ({**LIST, "maxItems": 1}, {"uniqueItems": True}, "[1]"),
        (LIST, {"unevaluatedItems": False}, "[1]"),
        (A, {"unevaluatedProperties": True}, '{"a": 1}'),
        (A, {"unevaluatedProperties": {}}, '{"a": 1}'),
        (A, {"unevaluatedProperties": False}, '{"a": 1}'),
        (A, {"minProperties": 1, "maxProperties": 3}, '{"a": 1}'),
        (A, {"dependentRequired": {"b": ["a"]}}, '{"a": 1}'),
        (A, {"dependentSchemas": {}, "dependencies": {}}, '{"a": 1}'),
        (INTEGER, {"not": False}, "1"),
        (INTEGER, {"then": {"minimum": 3}, "else": False}, "1"),
        (INTEGER, {"if": {"minimum": 3}}, "1"),
        (INTEGER, {"$dynamicAnchor": "node", "$recursiveAnchor": True}, "1"),
        (INTEGER, {"uniqueItems": True, "propertyNames": {"format": "date"}, "minProperties": 9}, "1"),
        (INTEGER, {"format": "int64"}, "1"),
        (LIST, {"contains": {"const": 3}, "minContains": 0}, "[1]"),
        (LIST, {"minContains": 2, "maxContains": 3}, "[1]"),
        ({"type": "string", "maxLength": 3}, {"format": "uri-reference"}, '"a b"'),
    ],
)
def test_what_has_no_effect_is_accepted(compiled: Any, schema: Any, more: Any, text: str) -> None:
    jsonschema.Draft202012Validator(schema | more).validate(json.loads(text))
    for whole in (schema | more, {"type": "object", "properties": {"x": schema | more}, "required": ["x"]}):
        assert compiled.take(whole, text if "x" not in whole.get("properties", {}) else f'{{"x": {text}}}')


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        (
            {**MAP, "propertyNames": {"enum": ["a", "b"]}},
            '{"a": 1, "b": 2}',
            '{"c": 1}',
        ),  # dict[Literal["a", "b"], int]
        ({**MAP, "propertyNames": {"const": "a"}}, '{"a": 1}', '{"b": 1}'),
        ({**MAP, "propertyNames": {"$ref": "#/$defs/E"}, "$defs": {"E": {"enum": ["a"]}}}, '{"a": 1}', '{"b": 1}'),
        ({**MAP, "propertyNames": {"pattern": "^x[0-9]$"}}, '{"x1": 1, "x2": 2}', '{"x": 1}'),
        ({**MAP, "propertyNames": {"minLength": 2, "maxLength": 3}}, '{"ab": 1, "abc": 2}', '{"a": 1}'),
        ({**MAP, "propertyNames": {"enum": ["a"]}, "required": ["a"]}, '{"a": 1}', "{}"),
        ({"properties": {"a": INTEGER}, "unevaluatedProperties": False}, '{"a": 1}', '{"a": 1, "b": 2}'),
        ({"type": "array", "prefixItems": [INTEGER], "unevaluatedItems": False}, "[1]", "[1, 2]"),
        ({"type": "string", "format": "uuid4"}, f'"{"0" * 8}-0000-4000-8000-{"0" * 12}"', '"0"'),
        ({"type": "string", "format": "date"}, '"2024-02-29"', '"2023-02-29"'),
        ({"type": "string", "format": "date"}, '"2000-02-29"', '"1900-02-29"'),
        ({"type": "string", "format": "date-time"}, '"2024-02-29T23:59:59.5+01:00"', '"2023-02-29T00:00:00Z"'),
        ({"type": "string", "format": "time"}, '"23:59:59Z"', '"23:59:60Z"'),
        ({"type": "string", "pattern": r"^(?=.*[A-Z])(?=.*\d)[A-Za-z\d]{3,}$"}, '"aB3"', '"ab3"'),
        ({"type": "string", "pattern": r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"}, '"-1.5"', '"-."'),  # pydantic's Decimal
    ],
)
def test_what_is_rewritten(compiled: Any, schema: Any, right: str, wrong: str) -> None:
    assert compiled.take(schema, right) and not compiled.take(schema, wrong)


@pytest.mark.parametrize("pattern", ["(?=a)b", "^a(?!b)", "^(?!foo)x", "(?<=a)b", "^(?=a", "^(?![ab]*$)(?=c)d(?!e)"])
def test_other_look_around_stays(pattern: str) -> None:
    assert without_lookahead(pattern) is None


MORE = 2**53 + 1


def optional(count: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"k{i}": {"type": "integer", "maximum": 9} for i in range(count)}}


def test_an_object_of_many_optional_properties_goes_on(compiled: Any) -> None:
    """It failed after "{" from 250 on."""
    for count in (260, 1000):
        grammar = compiled.compile(optional(count))
        for seed in range(3):
            compiled.write(grammar, seed, most=40)


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({"type": "array", "uniqueItems": True}, "uses uniqueItems, "),
        ({"items": optional(1001)}, r"uses properties at items\.properties, 1001 of them optional: at most 1000"),
        ({"properties": {"a": {"items": {"not": INTEGER}}}}, r"uses not at properties\.a\.items\.not, "),
        ({"anyOf": [{}, {"contains": INTEGER}]}, r"uses contains at anyOf\[1\]\.contains, "),
        ({"$ref": "#/$defs/x", "$defs": {"x": {"if": {}, "then": {}}}}, r"uses if at \$defs\.x\.if, "),
        ({"properties": {"a": {"pattern": "(?<=x)y"}}}, r"uses pattern at properties\.a\.pattern, with look-around"),
        ({"type": "integer", "minimum": MORE, "maximum": MORE + 2}, f"uses minimum, with {MORE}: bounds"),
        ({"type": "integer", "exclusiveMaximum": 2**63}, "uses exclusiveMaximum, with 9223372036854775808"),
        ({"type": "number", "maximum": -MORE}, f"uses maximum, with -{MORE}"),
        ({"properties": {"id": {"const": MORE}}}, rf"uses const at properties\.id\.const, with {MORE}: integers"),
        ({"enum": [1, {"a": [10**30]}]}, "uses enum, with 1000000000000000000000000000000"),
        ({**MAP, "minProperties": 2}, "uses minProperties, which counts repeated names: at most 1"),
        ({"properties": {"m": {**MAP, "properties": {"a": {}}, "required": ["a"], "minProperties": 3}}}, "at most 2"),
        ({"patternProperties": {"^x": {}}, "additionalProperties": False, "minProperties": 2}, "uses minProperties"),
    ],
)
def test_what_cannot_be_promised_is_refused_by_its_path(compiled: Any, schema: Any, problem: str) -> None:
    with pytest.raises(ConstraintError, match=problem):
        compiled.compile(schema)


def test_an_unused_definition_may_say_anything(compiled: Any) -> None:
    assert compiled.take({**INTEGER, "$defs": {"x": {"not": {}}, "y": {"minimum": MORE}}}, "1")
    assert compiled.take({**INTEGER, "examples": [{"not": 1}], "default": {"uniqueItems": True}}, "1")


def test_integers_are_exact_up_to_the_bound(compiled: Any) -> None:
    r, most = random.Random(0), 2**53 - 1
    for _ in range(60):
        low = r.choice([-most, most - 3, -3, r.randrange(-most, most)])
        high = min(most, low + r.choice([0, 1, 2, 1000, most]))
        bounds = {"type": "integer", "minimum": low, "maximum": high}
        assert compiled.take(bounds, str(low)) and compiled.take(bounds, str(high))
        assert not compiled.take(bounds, str(low - 1)) and not compiled.take(bounds, str(high + 1))
        inside = {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": high}
        if high - low > 1:
            assert compiled.take(inside, str(low + 1)) and compiled.take(inside, str(high - 1))
            assert not compiled.take(inside, str(low)) and not compiled.take(inside, str(high))
    for exact in (most, 2**53, 2**60, -(2**62), 0, 7, 1.5, 1e-7):
        text = compiled.write(compiled.compile({"const": exact}), 0)
        assert json.loads(text) == exact


@pytest.mark.parametrize(
    ("low", "high", "inside"),
    [
        (0, 0.5, "0.25"),
        (0, 1e-7, "0.00000005"),
        (0, 0.99, "0.5"),
        (75, 75.5, "75.1"),
        (-0.5, 0, "-0.1"),
        (-3.9, -3, "-3.5"),
    ],
)
def test_an_exclusive_integer_bound_of_a_small_range(compiled: Any, low: float, high: float, inside: str) -> None:
    for schema in (
        {"type": "number", "exclusiveMinimum": low, "exclusiveMaximum": high},
        {"type": "number", "exclusiveMinimum": low, "maximum": high},
        {"type": "number", "minimum": low, "exclusiveMaximum": high},
    ):
        assert compiled.take(schema, inside)
        for text in (f"{bound}{end}" for bound in (low, high, -0) for end in ("", ".0", "0") if "e" not in f"{bound}"):
            if text.count(".") < 2:
                valid = jsonschema.Draft202012Validator(schema).is_valid(float(text))
                assert valid or not compiled.take(schema, text), (schema, text)


def test_a_required_name_that_is_not_declared(compiled: Any) -> None:
    schema = {"type": "object", "properties": {"a": INTEGER}, "required": ["b"]}
    assert compiled.take(schema, '{"a": 1, "b": "x"}') and not compiled.take(schema, '{"a": 1}')
    schema = {"type": "object", "patternProperties": {"^b": INTEGER}, "required": ["b"]}
    assert compiled.take(schema, '{"b": 1, "bc": 2}') and not compiled.take(schema, '{"b": "x"}')


def test_minimum_counts_of_distinct_names(compiled: Any) -> None:
    schema = {**MAP, "properties": {"a": INTEGER}, "required": ["a"], "minProperties": 2}
    assert compiled.take(schema, '{"a": 1, "b": 2}')
    assert not compiled.take(schema, '{"a": 1}') and not compiled.take(schema, '{"a": 1, "a": 2}')
