"""JSON schema keywords that llguidance does not enforce: rewritten where that is possible, otherwise refused.

`simplified` removes keywords that have no effect and rewrites others into ones that llguidance enforces. `check` then
refuses what is left, naming the keyword's path. It follows references from the root, so unused definitions may contain
anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, TypeGuard

from ..constraint import ConstraintError
from .patterns import matched_names, matches_only, without_lookahead
from .walk import LITERALS, NAMED_SCHEMAS, Schema, as_dict, as_list, required, types, values

# Formats that llguidance enforces. Any other is an annotation, as JSON Schema defines.
FORMATS = frozenset({"date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"})
# llguidance's dates have a February 29 and a year 0 that calendars do not, and its times leap seconds at any time.
_YEAR = r"(?:\d{3}[1-9]|\d{2}[1-9]\d|\d[1-9]\d{2}|[1-9]\d{3})"
_LEAP_YEAR = r"(?:\d\d(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = rf"^(?:{_YEAR}-(?:0[13-9]|1[0-2]|02-(?:[01]|2[0-8]))|{_LEAP_YEAR}-02-29)"
_EXACT_FORMATS = {"date": _DATE, "date-time": rf"{_DATE}.*:[0-5]\d:[0-5]\d", "time": r"^\d\d:\d\d:[0-5]\d"}

MAX_OPTIONAL = 1000  # optional properties of one object: each is about four items in llguidance's parser row
_MAX_COMPARED = 50_000  # patterns × names: each takes 10 µs, holding the GIL
MAX_EXACT = 2**53 - 1  # largest integer bound: llguidance computes with float64

_ANNOTATIONS = frozenset({"title", "description", "$comment", "default", "examples", "deprecated"})
_APPLICATORS = frozenset({"allOf", "anyOf", "oneOf", "$ref", "if", "dependentSchemas", "dependencies", "$dynamicRef"})
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_OF_ARRAYS = ("contains", "minContains", "maxContains", "uniqueItems", "unevaluatedItems")
_OF_OBJECTS = ("propertyNames", "dependencies", "dependentRequired", "dependentSchemas", "unevaluatedProperties")
_UNSUPPORTED = ("not", "if", "then", "else", "$dynamicRef", "$recursiveRef", *_OF_ARRAYS, *_OF_OBJECTS)  # by llguidance
_TYPES = {  # keywords that apply to values of one type and ignore others
    "array": _OF_ARRAYS,
    "object": (*_OF_OBJECTS, "minProperties", "maxProperties"),
    "string": ("format", "pattern"),
}


def simplified(schema: Schema, root: Any, names: Sequence[str]) -> Schema:
    """A copy of ``schema``, whose subschemas are simplified already, that accepts the same values or fewer.

    ``names``: `declared_names` of the root.
    """
    schema = dict(schema)
    for type, keywords in _TYPES.items():
        if not _may_be(schema, type):
            for keyword in keywords:
                schema.pop(keyword, None)
    for keyword in [keyword for keyword in schema if _has_no_effect(keyword, schema)]:
        del schema[keyword]
    _rewrite_unevaluated(schema)
    _rewrite_property_names(schema, root)
    _fold_patterns(schema, names)
    _rewrite_format(schema)
    _narrow_exclusive_bounds(schema)
    return _with_patterns(schema)


def _rewrite_format(schema: Schema) -> None:
    if re.fullmatch("uuid[1-8]", str(schema.get("format"))):  # pydantic's
        schema["format"] = "uuid"
    elif isinstance(schema.get("format"), str) and schema["format"] not in FORMATS:
        del schema["format"]


def _with_patterns(schema: Schema) -> Schema:
    """``schema`` with a pattern that completes its format, and with patterns without look-ahead."""
    pattern, exact = schema.get("pattern"), _EXACT_FORMATS.get(str(schema.get("format")))
    patterns = without_lookahead(pattern) if isinstance(pattern, str) else []
    if patterns is None or (not exact and patterns in ([], [pattern])):
        return schema
    first, *more = [*patterns, exact] if exact else patterns
    others = [*as_list(schema.get("allOf")), *({"pattern": pattern} for pattern in more)]
    return {**schema, "pattern": first, **({"allOf": others} if others else {})}


def _has_no_effect(keyword: str, schema: Schema) -> bool:
    value = schema[keyword]
    match keyword:
        case "not":
            return value is False
        case "if":
            return not {"then", "else"} & schema.keys()
        case "then" | "else":
            return "if" not in schema
        case "$dynamicAnchor" | "$recursiveAnchor":
            return True  # only a dynamic reference would read it
        case "contains":
            return schema.get("minContains") == 0 and "maxContains" not in schema
        case "minContains":
            return "contains" not in schema or (value == 0 and "maxContains" not in schema)
        case "maxContains":
            return "contains" not in schema
        case "uniqueItems":
            return value is False or _at_most(schema.get("maxItems"), 1)
        case "unevaluatedItems":
            return accepts_all(value) or ("items" in schema and not isinstance(schema["items"], list))
        case "unevaluatedProperties":
            return accepts_all(value) or "additionalProperties" in schema
        case "propertyNames":
            return accepts_all(value) or (accepts_all(value, "type") and value["type"] == "string")
        case "dependentSchemas" | "dependencies":
            return not value
        case "dependentRequired":
            return isinstance(value, dict) and all(set(as_list(names)) <= required(schema) for names in value.values())
        case "minProperties":
            return _at_most(value, len(required(schema)))
        case "maxProperties":
            return _is_closed(schema) and _at_most(len(as_dict(schema.get("properties"))), value)
    return False


def _rewrite_unevaluated(schema: Schema) -> None:
    """Replaces the unevaluated keywords by the additional ones, if no other schema applies to the same value."""
    if _APPLICATORS & schema.keys():
        return
    if "unevaluatedProperties" in schema:
        schema["additionalProperties"] = schema.pop("unevaluatedProperties")
    if "unevaluatedItems" in schema and not isinstance(schema.get("items"), list):
        schema["items"] = schema.pop("unevaluatedItems")


def _rewrite_property_names(schema: Schema, root: Any) -> None:
    """Names of a closed list become properties; names of one pattern become a pattern property."""
    if "propertyNames" not in schema:
        return
    names = resolve(schema["propertyNames"], root)
    if not isinstance(names, dict):
        return
    others = schema.get("additionalProperties", True)
    keys = names.keys() - _ANNOTATIONS - {"type"}
    listed = names.get("enum", [names["const"]] if "const" in names else None)
    if keys <= {"enum", "const"} and isinstance(listed, list) and "patternProperties" not in schema:
        declared = as_dict(schema.get("properties"))
        schema["properties"] = {name: declared.get(name, others) for name in listed if isinstance(name, str)}
    elif keys and keys <= {"pattern", "minLength", "maxLength"} and not as_dict(schema.get("properties")):
        if "patternProperties" in schema or ("pattern" in keys and len(keys) > 1):
            return
        low, high = names.get("minLength", 0), names.get("maxLength", "")
        schema["patternProperties"] = {names.get("pattern", rf"^[\s\S]{{{low},{high}}}$"): others}
    else:
        return
    schema["additionalProperties"] = False
    del schema["propertyNames"]


def declared_names(root: Any) -> list[str]:
    """The property names that any schema inside ``root`` declares or requires; none if it has no patterns for names.

    Raises `ConstraintError` if comparing them with the patterns would take seconds.
    """
    names: dict[str, None] = {}
    patterns = 0
    for value in map(as_dict, values(root)):
        patterns += len(as_dict(value.get("patternProperties"))) + ("propertyNames" in value)
        names |= dict.fromkeys([*as_dict(value.get("properties")), *required(value)])
    if patterns * len(names) > _MAX_COMPARED:
        raise ConstraintError(
            f"uses patternProperties with {patterns} patterns beside {len(names)} property names, "
            f"of which the product must be at most {_MAX_COMPARED}"
        )
    return list(names) if patterns else []


def _fold_patterns(schema: Schema, names: Sequence[str]) -> None:
    """Write pattern properties that can only match ``names`` as properties.

    The names may be declared elsewhere, beside a ``$ref`` or in another branch of an ``allOf``. Once all of them are
    written, llguidance would allow a comma for one more property, after which nothing could follow.
    """
    for pattern, inner in list(as_dict(schema.get("patternProperties")).items()):
        properties = as_dict(schema.get("properties"))
        matched = matched_names(pattern, list(dict.fromkeys([*properties, *names])))
        if not matches_only(pattern, matched):
            continue
        for name in matched:
            declared = properties.get(name, True)
            if accepts_all(declared) or declared == inner:
                properties = {**properties, name: inner}
            elif not accepts_all(inner):
                properties = {**properties, name: {"allOf": [declared, inner]}}
        schema["properties"] = properties
        schema["patternProperties"] = {
            key: value for key, value in schema["patternProperties"].items() if key != pattern
        }
    if not schema.get("patternProperties", True):
        del schema["patternProperties"]


def _narrow_exclusive_bounds(schema: Schema) -> None:
    """Write exclusive bounds that are integers as inclusive ones, one 15th digit away, where the range is below 1.

    llguidance includes the integer where no other is in the range: 0 in ``0 < x < 0.5``.
    """
    if not _may_be(schema, "number"):
        return
    lowest = [schema[keyword] for keyword in ("minimum", "exclusiveMinimum") if _is_number(schema.get(keyword))]
    highest = [schema[keyword] for keyword in ("maximum", "exclusiveMaximum") if _is_number(schema.get(keyword))]
    if not lowest or not highest or not 0 < min(highest) - max(lowest) < 1:
        return
    for exclusive, inclusive, sign, tightest in (
        ("exclusiveMinimum", "minimum", 1, max),
        ("exclusiveMaximum", "maximum", -1, min),
    ):
        bound = schema.get(exclusive)
        if _is_number(bound) and bound == int(bound):
            digits = 15 - len(str(abs(int(bound))))
            narrowed = round(bound + sign * 10.0**-digits, digits)
            schema[inclusive] = tightest(narrowed, schema.get(inclusive, narrowed))
            del schema[exclusive]


def check(root: Any) -> None:
    """Raise `ConstraintError` for the first keyword, reachable from the root, that cannot be enforced."""
    seen: set[int] = set()
    pending: list[tuple[str, Any]] = [("", root)]
    while pending:
        path, schema = pending.pop()
        if not isinstance(schema, dict) or id(schema) in seen:
            continue
        seen.add(id(schema))
        _check_one(path, schema)
        target = resolve(schema, root)
        if target is not schema:
            pending.append((_pointer(schema["$ref"]), target))
        pending += reversed(list(subschemas(schema, path)))


def subschemas(schema: Schema, path: str = "") -> Iterator[tuple[str, Any]]:
    """The schemas inside ``schema`` that apply to its values or to parts of them, each with its path."""
    for keyword, value in schema.items():
        at = f"{path}.{keyword}" if path else keyword
        if keyword in ("$defs", "definitions") or keyword in LITERALS:
            continue
        if keyword in NAMED_SCHEMAS and isinstance(value, dict):
            yield from ((f"{at}.{name}", inner) for name, inner in value.items())
        elif isinstance(value, list):
            yield from ((f"{at}[{i}]", inner) for i, inner in enumerate(value))
        elif isinstance(value, dict):
            yield at, value


def _check_one(path: str, schema: Schema) -> None:
    def refuse(keyword: str, why: str = "which cannot be enforced") -> ConstraintError:
        return ConstraintError(f"uses {keyword} at {path}.{keyword}, {why}" if path else f"uses {keyword}, {why}")

    for keyword in _UNSUPPORTED:
        if keyword in schema:
            raise refuse(keyword)
    for keyword in ("pattern", "patternProperties"):
        patterns = [schema["pattern"]] if keyword == "pattern" and keyword in schema else as_dict(schema.get(keyword))
        for pattern in patterns:
            if isinstance(pattern, str) and without_lookahead(pattern) != [pattern]:
                raise refuse(keyword, "with look-around, which cannot be enforced")
    for keyword in _BOUNDS:
        bound = schema.get(keyword)
        if _is_number(bound) and abs(bound) > MAX_EXACT and (_may_be(schema, "integer") or isinstance(bound, int)):
            raise refuse(keyword, f"with {bound}: bounds beyond ±{MAX_EXACT} cannot be enforced exactly")
    for keyword in ("const", "enum"):
        if keyword in schema:
            for number in values(schema[keyword]):
                if isinstance(number, int) and not isinstance(number, bool) and not _is_exact(number):
                    raise refuse(keyword, f"with {number}: integers beyond ±{MAX_EXACT} cannot be enforced exactly")
    optional = len(as_dict(schema.get("properties")).keys() - required(schema))
    if optional > MAX_OPTIONAL:
        raise refuse("properties", f"{optional} of them optional: at most {MAX_OPTIONAL} can be enforced")
    least = len(required(schema)) + 1
    if not _is_closed(schema) and not _at_most(schema.get("minProperties", 0), least):
        raise refuse("minProperties", f"which counts repeated names: at most {least} can be enforced here")


def resolve(schema: Any, root: Any) -> Any:
    """The schema that a local ``$ref`` leads to; ``schema`` itself if there is none. None: it leads nowhere."""
    for _ in range(8):
        reference = schema.get("$ref") if isinstance(schema, dict) else None
        if not isinstance(reference, str) or not (reference + "/").startswith("#/"):
            break
        schema = root
        for part in reference[2:].split("/") if len(reference) > 2 else []:
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(schema, list):
                schema = schema[int(name)] if name.isdecimal() and int(name) < len(schema) else None
            else:
                schema = schema.get(name) if isinstance(schema, dict) else None
    return schema


def _pointer(reference: str) -> str:
    return reference.removeprefix("#/").replace("/", ".").removeprefix("#")


def _may_be(schema: Schema, type: str) -> bool:
    """Whether values of ``type`` satisfy the schema's ``type`` keyword."""
    allowed = types(schema)
    return allowed is None or type in allowed


def accepts_all(value: Any, *ignored: str) -> bool:
    return value is True or (isinstance(value, dict) and not value.keys() - _ANNOTATIONS - set(ignored))


def _is_closed(schema: Schema) -> bool:
    return schema.get("additionalProperties") is False and not schema.get("patternProperties")


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _at_most(value: Any, limit: Any) -> bool:
    return _is_number(value) and _is_number(limit) and value <= limit


def _is_exact(number: int) -> bool:
    """Whether llguidance, which computes with float64 and int64, writes the number as it is."""
    return abs(number) < 2**63 and float(number) == number
