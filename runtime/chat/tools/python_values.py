"""Python literals as models write them, turned into JSON as they arrive."""

from __future__ import annotations

import re

from .json_values import escape, string
from .reader import SPACE, Malformed, Markers, Reader, Show, Wait

# A complete string without escapes: a fast path for `_string`.
_SHORT_STRING = re.compile(r"""\"([^"\\]+)\"|'([^'\\]+)'|""(?=[^"])|''(?=[^'])""")
_WORD = re.compile(r"[0-9A-Za-z_.+\-]+")
_BARE_KEY = re.compile(r"[^\s:{}\[\],\"'<]+")
_BLANK = frozenset(["", " ", "\t", "\r", "\n"])  # nothing to go by: more text, or the end, must come first
_CLOSED = {"{": "}", "[": "]", "(": ")"}
_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
JSON_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_PYTHON_NUMBER = re.compile(r"([+-]?)([0-9]+(?:_[0-9]+)*)?(\.(?:[0-9]+(?:_[0-9]+)*)?)?([eE][+-]?[0-9]+)?")
_BASED = re.compile(r"([+-]?)(0[xX][0-9a-fA-F]{1,64}|0[oO][0-7]{1,64}|0[bB][01]{1,64})")

# What may come next, inside a dict or a list (or a tuple, which JSON writes as a list).
# From _KEY on it may also be the closing bracket.
_VALUE, _COLON, _KEY, _ITEM, _AFTER = range(5)


def value(reader: Reader, show: Show, opened: str = "", *, lead: str = "", quote: str = "") -> Wait[None]:
    """Reads one literal; ``show`` gets the same value as JSON, in pieces, whitespace as written.

    ``opened``: the value is a dict of which this, ``{`` and blanks, has been read. ``lead`` is shown right before the
    first piece. ``quote``: a string that also delimits strings, without escapes; keys may then be bare words. Raises
    `Malformed` at what is no literal; what was shown is then the beginning of a JSON text.
    """
    quotes = Markers((quote,)) if quote else None
    closers = ["}"] if opened else []
    state = _KEY if opened else _VALUE
    if opened:
        show(opened)
    while True:
        pending = lead
        following = reader.text[reader.at : reader.at + 1]
        if following in _BLANK:
            pending += yield from reader.run(SPACE)
            following = reader.text[reader.at : reader.at + 1]
        if state == _AFTER and following == ",":
            reader.take(reader.at + 1)
            blank = ""
            following = reader.text[reader.at : reader.at + 1]
            if following in _BLANK:
                blank = yield from reader.run(SPACE)
                following = reader.text[reader.at : reader.at + 1]
            state = _KEY if closers[-1] == "}" else _ITEM
            pending += ("" if following == closers[-1] else ",") + blank  # JSON has no trailing comma
        if not following:
            raise Malformed
        lead = ""
        if state >= _KEY and following == closers[-1]:
            reader.take(reader.at + 1)
            show(pending + ("}" if closers.pop() == "}" else "]"))
            state = _AFTER
        elif state == _COLON:
            if following != ":":
                raise Malformed
            reader.take(reader.at + 1)
            lead = pending + ":"
            state = _VALUE
        elif state == _AFTER:
            raise Malformed
        elif quotes and following == quote[0] and (yield from reader.literal((quote,))):
            show(pending + '"')
            if not (yield from reader.until(quotes, lambda text: show(escape(text)))):
                raise Malformed
            reader.take(reader.at + len(quote))
            show('"')
            state = _COLON if state == _KEY else _AFTER
        elif following in "\"'":
            while len(reader.text) - reader.at < 3 and not reader.ended:
                yield  # enough to tell an empty string from a tripled quote
            match = _SHORT_STRING.match(reader.text, reader.at)
            if match:
                reader.take(match.end())
                show(f'{pending}"{escape(match[1] or match[2] or "")}"')
            else:
                yield from _string(reader, show, pending)
            state = _COLON if state == _KEY else _AFTER
        elif state == _KEY:
            key = (yield from reader.run(_BARE_KEY)) if quotes else ""
            if not key:
                raise Malformed
            show(f'{pending}"{escape(key)}"')
            state = _COLON
        elif following in "{[(":
            reader.take(reader.at + 1)
            show(pending + ("{" if following == "{" else "["))
            closers.append(_CLOSED[following])
            state = _KEY if following == "{" else _ITEM
        else:
            match = _WORD.match(reader.text, reader.at)
            if match and match.end() < len(reader.text):
                word = reader.take(match.end())
            else:
                word = yield from reader.run(_WORD)
            show(pending + scalar(word))
            state = _AFTER
        if state == _AFTER and not closers:
            return


def _string(reader: Reader, show: Show, lead: str) -> Wait[None]:
    show(lead + '"')
    yield from string(reader, lambda text: show(escape(text)), triple=True)
    show('"')


def scalar(word: str) -> str:
    """A number or constant as JSON writes it. Raises `Malformed` if it is neither."""
    if word in _WORDS:
        return _WORDS[word]
    if JSON_NUMBER.fullmatch(word):
        return word
    based = _BASED.fullmatch(word)
    if based:
        return ("-" if based[1] == "-" else "") + str(int(based[2], 0))
    match = _PYTHON_NUMBER.fullmatch(word)
    if not match or not (match[2] or (match[3] or "")[1:]):
        raise Malformed
    whole = (match[2] or "0").replace("_", "")
    if len(whole) > 1 and whole[0] == "0" and not match[3] and not match[4] and whole.strip("0"):
        raise Malformed  # 017 is no Python number
    fraction = (match[3] or "").replace("_", "")
    if fraction == ".":
        fraction = ".0"
    return ("-" if match[1] == "-" else "") + (whole.lstrip("0") or "0") + fraction + (match[4] or "")
