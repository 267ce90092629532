"""JSON, Python and JavaScript values as models write them, repaired into JSON as they arrive.

The repairs are those of the libraries that clients use on such output (json_repair, dirty-json): literals and numbers
of other languages, comments, single quotes, bare words and keys, quotes inside strings, and missing or superfluous
commas, colons and brackets. Valid JSON comes through unchanged.
"""

from __future__ import annotations

import re

from .json_values import escape, json_string, string
from .reader import SPACE, Malformed, Markers, Reader, Show, Wait

# Complete strings without escapes, in Python and in JSON: fast paths for `string` and `json_string`.
_SHORT_STRING = re.compile(r"""(?:\"([^"\\]+)\"|'([^'\\]+)'|""|'')(?=[\s,:)}\]])""")
_SHORT_JSON = re.compile(r'"[^"\\\x00-\x1f]*"(?=[,:}\]])')
_BARE_KEY = re.compile(r"[^\s:={}\[\](),\"'<]+")
_BARE = re.compile(r"[^,()\[\]{}\"'<\n#/]+")
_NUMBER = re.compile(r"[0-9.eE+\-]+(?=[,\]}])")  # a fast path
_COMMENTS = ("#", "//", "/*")
_COMMENT_LINE = re.compile(r"[^\n]+")
_NOT_STAR = re.compile(r"[^*]+")
_BLANK = frozenset(["", " ", "\t", "\r", "\n"])  # does not say what follows: read on
_CLOSED = {"{": "}", "[": "]", "(": ")"}
_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_WORDS |= dict.fromkeys(("NaN", "nan", "Infinity", "-Infinity", "+Infinity", "inf", "-inf", "undefined"), "null")
JSON_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_PYTHON_NUMBER = re.compile(r"([+-]?)([0-9]+(?:_[0-9]+)*)?(\.(?:[0-9]+(?:_[0-9]+)*)?)?([eE][+-]?[0-9]+)?")
_BASED = re.compile(r"([+-]?)(0[xX][0-9a-fA-F]{1,64}|0[oO][0-7]{1,64}|0[bB][01]{1,64})")

_PUNCTUATION = frozenset(",:}])")
# What may come next, inside a dict or a list (or a tuple, which JSON writes as a list).
# From _KEY on it may also be the closing bracket.
_VALUE, _COLON, _KEY, _ITEM, _AFTER = range(5)
_MISSING = {_VALUE: " null", _COLON: ": null"}  # of an entry whose key was shown


def value(
    reader: Reader, show: Show, *, lead: str = "", quote: str = "", json: bool = False, strict: bool = False
) -> Wait[None]:
    """Reads one value; ``show`` gets it as JSON, in pieces, whitespace as written. ``lead`` is shown before the first.

    ``quote``: a string that also delimits strings, without escapes. ``json``: strings in double quotes have JSON's
    escapes, and come through as written; otherwise Python's. ``strict``: nothing is repaired but raw control characters
    and unknown escapes in strings.

    Raises `Malformed` at the end of the text, at a ``<`` that may begin a marker, and if ``strict`` at what is not
    JSON. What was shown is then the beginning of a JSON text.
    """
    quotes = Markers((quote,)) if quote else None
    closers: list[str] = []
    state = _VALUE
    while True:
        pending, lead = lead, ""
        following = reader.text[reader.at : reader.at + 1]
        if following in _BLANK:
            pending += yield from reader.run(SPACE)
            following = reader.text[reader.at : reader.at + 1]
        if following == "=" and state == _COLON and not strict:
            following = ":"
        if following in _PUNCTUATION:
            if state == _COLON and following == ":":
                reader.take(reader.at + 1)
                lead, state = pending + ":", _VALUE
            elif state == _AFTER and following == ",":
                reader.take(reader.at + 1)
                lead, state = pending + ",", _entry(closers)
            elif state >= _KEY and following == closers[-1] and not (strict and "," in pending):
                reader.take(reader.at + 1)
                state = _AFTER
                show(pending.replace(",", "") + _closing([closers.pop()]))
            elif strict or not closers:
                raise Malformed(_opened(closers))
            elif state < _KEY and following != ":":
                show(pending + _MISSING[state])
                state = _AFTER
            elif following in closers or following == ")":  # what is inside was not closed
                keep = closers.index(following) + 1 if following in closers else 0
                show(pending.replace(",", "") + _closing(closers[keep:]))
                closers, state = closers[:keep], _AFTER
            else:  # superfluous
                reader.take(reader.at + 1)
                lead = pending
            if state == _AFTER and not closers:
                return
            continue
        quoted = quotes and following == quote[0] and (yield from reader.ahead((quote,)))
        if not following or (following == "<" and not quoted):
            missing = pending.replace(",", "") + _MISSING.get(state, "") + _closing(closers)
            raise Malformed(_opened(closers), missing if closers else "")
        if not strict and following in "/#" and (yield from _comment(reader)):
            lead = pending
        elif state in (_COLON, _AFTER):
            if strict:
                raise Malformed(_opened(closers))
            lead, state = (pending + ":", _VALUE) if state == _COLON else (pending + ",", _entry(closers))
        elif quotes and quoted:
            reader.take(reader.at + len(quote))
            show(pending + '"')
            if not (yield from reader.until(quotes, lambda text: show(escape(text)))):
                raise Malformed
            reader.take(reader.at + len(quote))
            show('"')
            state = _COLON if state == _KEY else _AFTER
        elif following in "\"'":
            if strict and following == "'":
                raise Malformed(_opened(closers))
            yield from _quoted(reader, show, pending, json=json and following == '"', strict=strict or state == _KEY)
            state = _COLON if state == _KEY else _AFTER
        elif state == _KEY:
            key = "" if strict else (yield from reader.run(_BARE_KEY))
            if not key and strict:
                raise Malformed(_opened(closers))
            show(f'{pending}"{escape(key or reader.take(reader.at + 1))}"')
            state = _COLON
        elif following in "{[" or (following == "(" and not strict):
            reader.take(reader.at + 1)
            show(pending + ("{" if following == "{" else "["))
            closers.append(_CLOSED[following])
            state = _KEY if following == "{" else _ITEM
        else:
            match = _NUMBER.match(reader.text, reader.at)
            text = reader.take(match.end()) if match else (yield from _bare(reader, nested=bool(closers)))
            word = text.rstrip()
            plain = JSON_NUMBER.fullmatch(word)
            if not plain and (
                (strict and word not in ("true", "false", "null")) or (reader.ended and reader.at == len(reader.text))
            ):
                raise Malformed(_opened(closers))  # not JSON, or cut off
            show(pending + (word if plain else scalar(word)))
            lead, state = text[len(word) :], _AFTER
        if state == _AFTER and not closers:
            return


def _entry(closers: list[str]) -> int:
    return _KEY if closers[-1] == "}" else _ITEM


def _closing(closers: list[str]) -> str:
    return "".join("}" if closer == "}" else "]" for closer in reversed(closers))


def _opened(closers: list[str]) -> str:
    return "".join("{" if closer == "}" else "[" for closer in closers)


def _quoted(reader: Reader, show: Show, lead: str, *, json: bool, strict: bool) -> Wait[None]:
    """A string, in one piece where it has arrived whole."""
    while len(reader.text) - reader.at < 3 and not reader.ended:
        yield  # enough to tell an empty string from a tripled quote
    if json:
        match = _SHORT_JSON.match(reader.text, reader.at)
        if match:
            show(lead + reader.take(match.end()))
        else:
            show(lead)
            yield from json_string(reader, show, strict=strict)
        return
    match = _SHORT_STRING.match(reader.text, reader.at)
    if match:
        reader.take(match.end())
        show(f'{lead}"{escape(match[1] or match[2] or "")}"')
    else:
        show(lead + '"')
        yield from string(reader, lambda text: show(escape(text)), triple=True, lenient=True)
        show('"')


def _comment(reader: Reader) -> Wait[bool]:
    """Reads a comment of Python, JavaScript or C, if one comes next."""
    if (yield from reader.literal(_COMMENTS[:2])):
        yield from reader.stream(_COMMENT_LINE, _drop)
        return True
    if not (yield from reader.literal(_COMMENTS[2:])):
        return False
    while (yield from reader.stream(_NOT_STAR, _drop)):
        if (yield from reader.literal(("*/",))):
            return True
        reader.take(reader.at + 1)
    return True


def _drop(_: str) -> None:
    pass


def _bare(reader: Reader, *, nested: bool) -> Wait[str]:
    """Reads text without quotes around it, such as an expression, to the comma, line end or bracket that ends it.

    Brackets inside it belong to it, and strings unless ``nested`` in a container, where the string is the next item.
    """
    pieces: list[str] = []
    depth = 0
    while True:
        following = yield from reader.stream(_BARE, pieces.append)
        if following in ("", "<") or (not depth and following in ",)]}\n"):
            return "".join(pieces)
        if following in "\"'":
            if nested and not depth:
                return "".join(pieces)
            raw: list[str] = []
            yield from string(reader, raw.append)
            pieces.append(following + "".join(raw) + following)
            continue
        if following in "#/" and pieces and pieces[-1][-1] in " \t" and (yield from reader.ahead(_COMMENTS)):
            return "".join(pieces)
        depth += (following in "([{") - (following in ")]}")
        pieces.append(reader.take(reader.at + 1))


def scalar(word: str) -> str:
    """A number or constant of JSON, Python or JavaScript as JSON writes it; a string of anything else."""
    if word in _WORDS:
        return _WORDS[word]
    if JSON_NUMBER.fullmatch(word):
        return word
    return _number(word) or f'"{escape(word)}"'


def _number(word: str) -> str | None:
    """A number of Python or JavaScript as JSON writes it; None if it is none."""
    based = _BASED.fullmatch(word)
    if based:
        return ("-" if based[1] == "-" else "") + str(int(based[2], 0))
    match = _PYTHON_NUMBER.fullmatch(word)
    if not match or not (match[2] or (match[3] or "")[1:]):
        return None
    whole = (match[2] or "0").replace("_", "")
    if len(whole) > 1 and whole[0] == "0" and not match[3] and not match[4] and whole.strip("0"):
        return None  # 017 is no number of Python, and an octal one elsewhere
    fraction = (match[3] or "").replace("_", "")
    if fraction == ".":
        fraction = ".0"
    return ("-" if match[1] == "-" else "") + (whole.lstrip("0") or "0") + fraction + (match[4] or "")
