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
