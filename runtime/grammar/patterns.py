"""Regular expressions of JSON schemas: look-ahead written without it, and names that a property pattern matches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

_LOOKAROUND = ("(?=", "(?!", "(?<=", "(?<!")
_MAX_CHECKED_NAMES = 256  # names of one object that a pattern is checked against


# Patterns of zod 4 with look-ahead inside, and the same without: ``z.email()`` and ``z.iso.duration()``.
_LOCAL = r"[A-Za-z0-9_'+\-]"
_TIME = r"T(?:\d+H(?:\d+M)?(?:\d+(?:[.,]\d+)?S)?|\d+M(?:\d+(?:[.,]\d+)?S)?|\d+(?:[.,]\d+)?S)"
_KNOWN = {
    r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$": (
        rf"^(?:{_LOCAL}+\.)*{_LOCAL}*[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{{2,}}$"
    ),
    r"^P(?:(\d+W)|(?!.*W)(?=\d|T\d)(\d+Y)?(\d+M)?(\d+D)?(T(?=\d)(\d+H)?(\d+M)?(\d+([.,]\d+)?S)?)?)$": (
        rf"^P(?:\d+W|(?:\d+Y(?:\d+M)?(?:\d+D)?|\d+M(?:\d+D)?|\d+D)(?:{_TIME})?|{_TIME})$"
    ),
}


def without_lookahead(pattern: str) -> list[str] | None:
    """Patterns that a string must all match in order to match ``pattern``, without look-around.

    Handles look-ahead at the beginning of an anchored pattern: ``^(?=.*[A-Z])(?=.*[0-9]).{8,}$`` of passwords, and
    ``^(?!^[-+.]*$)…`` of pydantic's Decimal, a class of characters that must not be all there is. Returns None for
    any other look-around.
    """
    if not any(mark in pattern for mark in _LOOKAROUND):
        return [pattern]
    if pattern in _KNOWN:
        return [_KNOWN[pattern]]
    if not pattern.startswith("^(?"):
        return None  # look-around that may apply anywhere in the string
    rest = pattern[1:]
    patterns = []
    while rest.startswith(("(?=", "(?!")):
        end = _group_end(rest)
        if end is None:
            return None
        inner = rest[3:end].removeprefix("^")
        if rest.startswith("(?="):
            patterns.append(f"^(?:{inner})")
        elif inner.startswith("[") and inner.endswith("]*$") and _class_end(inner, 0) == len(inner) - 3:
            characters = inner[1:-3]
            patterns.append(f"[{characters[1:]}]" if characters.startswith("^") else f"[^{characters}]")
        else:
            return None
        rest = rest[end + 1 :]
    patterns.append(f"^{rest}")
    return None if any(mark in part for part in patterns for mark in _LOOKAROUND) else patterns


def _group_end(pattern: str) -> int | None:
    """Index of the bracket that closes the group at the start of ``pattern``."""
    depth, i = 0, 0
    while i < len(pattern):
        if pattern[i] == "\\":
            i += 1
        elif pattern[i] == "[":
            end = _class_end(pattern, i)
            if end is None:
                return None
            i = end
        elif pattern[i] == "(":
            depth += 1
        elif pattern[i] == ")":
            depth -= 1
            if depth == 0:
                return i
        i += 1
    return None


def _class_end(pattern: str, start: int) -> int | None:
    """Index of the bracket that closes the character class at ``start``."""
    i = start + 1
    if pattern[i : i + 1] == "^":
        i += 1
    while i < len(pattern) and pattern[i] != "]":
        i += 2 if pattern[i] == "\\" else 1
    return i if i < len(pattern) else None


def matched_names(pattern: str, names: Sequence[str]) -> list[str]:
    """The names that ``pattern`` matches, as llguidance reads it."""
    matcher = _matcher({"type": "string", "pattern": pattern})
    return [name for name in names if _accepts(matcher.deep_copy(), _json(name))]


def _accepts(matcher: Any, data: bytes) -> bool:
    return bool(matcher.try_consume_tokens(list(data)) == len(data) and matcher.is_accepting())


def matches_only(pattern: str, names: Sequence[str]) -> bool:
    """Whether ``pattern`` matches no property name but ``names``.

    Once those are written, llguidance would allow a comma for one more property, after which nothing could follow.
    """
    if not names or len(names) > _MAX_CHECKED_NAMES:
        return False
    constant = {"const": 0}
    matcher = _matcher(
        {
            "type": "object",
            "properties": dict.fromkeys(names, constant),
            "required": list(names),
            "patternProperties": {pattern: constant},
            "additionalProperties": False,
        }
    )
    data = b"{" + b"".join(_json(name) + b":0," for name in names)
    if matcher.is_error() or matcher.try_consume_tokens(list(data)) < len(data):
        return not matcher.is_error()
    matcher.compute_bitmask()
    return bool(matcher.is_error())


def matches_nothing(definitions: str, terminals: str) -> bool:
    """Whether no text matches ``terminals``, a sequence of names and regular expressions.

    ``definitions``: of the names, as statements of a Lark grammar.
    """
    from llguidance import LLMatcher, LLParserLimits

    lark = f"{definitions}\nstart: ALL__\nALL__: {terminals}"
    limits = LLParserLimits(initial_lexer_fuel=500_000, step_lexer_fuel=50_000)
    matcher = LLMatcher(_byte_tokenizer(), LLMatcher.grammar_from_lark(lark), log_level=0, limits=limits)
    if matcher.is_error():
        return False  # compiling the grammar reports its error
    matcher.compute_bitmask()
    return bool(matcher.is_error()) and "NoExtension" in matcher.get_error()


def _json(name: str) -> bytes:
    return json.dumps(name, ensure_ascii=False).encode()


def _matcher(schema: dict[str, Any]) -> Any:
    """A matcher over bytes, of JSON without whitespace."""
    from llguidance import LLMatcher

    schema["x-guidance"] = {"whitespace_flexible": False}
    return LLMatcher(_byte_tokenizer(), LLMatcher.grammar_from_json_schema(json.dumps(schema)), log_level=0)


@cache
def _byte_tokenizer() -> Any:
    from llguidance import LLTokenizer

    return LLTokenizer("byte")
