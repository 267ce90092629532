"""A few hundred JSON schemas, generated: the same ones every time."""

from __future__ import annotations

import random
from typing import Any

WORDS = ["name", "age", "city", "tags", "price", "unit", "id", "note", "größe", 'a"b', "x y", "ok"]
PATTERNS = ["^[a-z]{1,4}$", "^[A-Z][0-9]{2}-[0-9]{2}$", "^(red|green|blue)$", "^a?b+c{1,2}$", r"^\d{1,3}\.\d$"]
FORMATS = ["date", "time", "date-time", "uuid", "ipv4", "email"]


def string(r: random.Random) -> dict[str, Any]:
    kind = r.randrange(4)
    if kind == 0:
        return {"type": "string", "maxLength": r.randrange(1, 8)}
    if kind == 1:
        low = r.randrange(3)
        return {"type": "string", "minLength": low, "maxLength": low + r.randrange(6)}
    if kind == 2:
        return {"type": "string", "pattern": r.choice(PATTERNS)}
    return {"type": "string", "format": r.choice(FORMATS)}


def number(r: random.Random) -> dict[str, Any]:
    kind = r.choice(["integer", "integer", "number"])
    low = r.randrange(-50, 50)
    schema: dict[str, Any] = {"type": kind, r.choice(["minimum", "exclusiveMinimum"]): low}
    schema[r.choice(["maximum", "exclusiveMaximum"])] = low + r.randrange(3, 200)
    return schema


def leaf(r: random.Random) -> dict[str, Any]:
    kind = r.randrange(6)
    if kind == 0:
        return {"enum": r.sample([None, True, 3, -1.5, "x", "yes", {"k": [1]}, [], "ü"], r.randrange(1, 5))}
    if kind == 1:
        return {"const": r.choice(["fixed", 7, None, [1, 2]])}
    if kind == 2:
        return {"type": r.choice(["boolean", "null", ["boolean", "null"]])}
    return string(r) if kind < 5 else number(r)


def value(r: random.Random, depth: int) -> dict[str, Any]:
    kind = r.randrange(6) if depth else 5
    if kind < 2:
        names = r.sample(WORDS, r.randrange(1, 4))
        return {
            "type": "object",
            "properties": {name: value(r, depth - 1) for name in names},
            "required": r.sample(names, r.randrange(len(names) + 1)),
            "additionalProperties": False,
        }
    if kind == 2:
        low = r.randrange(3)
        return {"type": "array", "items": value(r, depth - 1), "minItems": low, "maxItems": low + r.randrange(3)}
    if kind == 3:
        return {"anyOf": [value(r, depth - 1) for _ in range(r.randrange(1, 4))]}
    if kind == 4:
        return {"type": "array", "prefixItems": [leaf(r), leaf(r)], "items": False, "minItems": 2}
    return leaf(r)


def recursive(r: random.Random) -> dict[str, Any]:
    node = {
        "type": "object",
        "properties": {
            "v": leaf(r),
            "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
            "kids": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
        },
        "required": ["v", "next"],
        "additionalProperties": False,
    }
    return {"$ref": "#/$defs/node", "$defs": {"node": node}}


def tagged(r: random.Random) -> dict[str, Any]:
    """A tagged union as pydantic writes it: ``oneOf`` of references."""
    kinds = r.sample(["cat", "dog", "eel", "fox"], r.randrange(2, 4))
    made = {
        kind: {
            "type": "object",
            "properties": {"kind": {"const": kind}, "x": leaf(r)},
            "required": ["kind", "x"],
            "additionalProperties": False,
        }
        for kind in kinds
    }
    discriminator = {"propertyName": "kind", "mapping": {kind: f"#/$defs/{kind}" for kind in kinds}}
    return {"oneOf": [{"$ref": f"#/$defs/{kind}"} for kind in kinds], "discriminator": discriminator, "$defs": made}


def schemas(count: int, seed: int = 0) -> list[dict[str, Any]]:
    r = random.Random(seed)
    return [recursive(r) if i % 10 == 0 else tagged(r) if i % 10 == 1 else value(r, 3) for i in range(count)]


def spoiled(r: random.Random, schema: dict[str, Any]) -> dict[str, Any]:
    """``schema`` with keywords beside it that have no effect, contradict it, or are hard to promise."""
    extra: list[dict[str, Any]] = [
        {"uniqueItems": False},
        {"propertyNames": {"type": "string"}},
        {"propertyNames": {"enum": r.sample(WORDS, 3)}},
        {"propertyNames": {"pattern": r.choice(["^[a-c]+$", "^x", "z"])}},
        {"propertyNames": {"minLength": 2, "maxLength": 3}},
        {"unevaluatedProperties": r.choice([True, False])},
        {"unevaluatedItems": r.choice([True, False])},
        {"minProperties": r.randrange(4)},
        {"maxProperties": r.randrange(5)},
        {"format": r.choice(["path", "binary", "regex", "uuid4", "int32", "color"])},
        {"patternProperties": {f"^{r.choice(WORDS[:6])}$": leaf(r)}},
        {"patternProperties": {"^(name|age|city)$": leaf(r), "^(tags|price)$": leaf(r)}},
        {"patternProperties": {"^[nac]": leaf(r)}},
        {"additionalProperties": r.choice([True, False, leaf(r)])},
        {"minLength": r.randrange(4), "maxLength": r.randrange(5)},
        {"pattern": r.choice([*PATTERNS, r"^(?=.*[a-z])(?=.*\d)[a-z0-9]{2,4}$", r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"])},
        {"minItems": r.randrange(3), "maxItems": r.randrange(3)},
        {"items": r.choice([False, leaf(r)])},
        {"multipleOf": r.choice([1, 3, 0.5, 7])},
        {"minimum": r.choice([0, -(2**53) + 1, 2**53, 3])},
        {"maximum": r.choice([2**53 - 1, 2**53 + 3, 9, 3.5])},
        {"enum": [1, "a", None, 2**60, 9007199254740993][: r.randrange(1, 6)]},
        {"allOf": [leaf(r)]},
        {"allOf": [{"required": r.sample(WORDS, 1)}, {"maxProperties": 4}]},
        {"anyOf": [leaf(r), {"type": "object"}, {"type": "array"}]},
        {"oneOf": [leaf(r), leaf(r)]},
        {"required": r.sample(WORDS, r.randrange(3))},
        {"dependentRequired": {"name": ["age"]}},
        {"not": r.choice([False, {"type": "null"}])},
        {"contains": {"type": "integer"}, "minContains": 0},
        {"$dynamicAnchor": "node"},
        {"type": r.choice(["object", "array", "string", "integer", ["object", "string"]])},
    ]
    for more in r.sample(extra, r.randrange(1, 4)):
        schema = schema | more
    inner = schema.get("properties")
    if isinstance(inner, dict) and inner and r.random() < 0.5:
        name = r.choice(list(inner))
        schema = schema | {"properties": inner | {name: spoiled(r, inner[name])}}
    return schema


def hard(count: int, seed: int) -> list[dict[str, Any]]:
    r = random.Random(seed)
    return [spoiled(r, value(r, 2)) for _ in range(count)]
