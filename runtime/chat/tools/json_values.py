"""JSON as models write it: scanned as it arrives and passed on as written, never parsed and serialised again."""

from __future__ import annotations

import json
import re
from json.encoder import encode_basestring

from .reader import Malformed, Reader, Show, Wait

_IN_STRING = re.compile(r'[^"\\\x00-\x1f]+')
_BETWEEN_BRACKETS = re.compile(r'[^"{}\[\]<\\]+')
# After a quote: what must follow the end of a string, or text and (the group) another quote.
_QUOTE_INSIDE = re.compile(r"""[ \t]*(?:[,:}\])<;\r\n]|(?<=[ \t])["'/#]|[^"\n]*(?:(")|\n))""")
_LOOKAHEAD = 128  # characters from a quote on, in which the other must come
_CLOSING = {"{": "}", "[": "]"}
_JSON_ESCAPES = frozenset('"\\/bfnrt')
CONTENTS = {quote: re.compile(rf"[^{quote}\\]+") for quote in "\"'"}
_HEX = frozenset("0123456789abcdefABCDEF")
_ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "a": "\a", "\n": ""}
_ESCAPES |= {character: character for character in "\"'\\/"}
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}
_SURROGATE = re.compile("[\ud800-\udfff]")


def escape(text: str) -> str:
    """``text`` as the inside of a JSON string. Half a surrogate pair stays an escape: UTF-8 has no form for it."""
    written = encode_basestring(text)[1:-1]
    if written.isascii():
        return written
    return _SURROGATE.sub(lambda half: f"\\u{ord(half.group()):04x}", written)


def is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=_refuse, parse_int=str)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def json_string(reader: Reader, show: Show, *, strict: bool = False) -> Wait[None]:
    """Reads a JSON string, quotes included; ``show`` gets it as written, in pieces, but for what JSON does not allow.

    A raw control character becomes an escape, an escape that JSON lacks what it must mean, and unless ``strict`` a
    quote that does not end the string an escaped quote.
    """
    show(reader.take(reader.at + 1))
    while True:
        found = yield from reader.stream(_IN_STRING, show)
        if not found:
            raise Malformed
        if found == "\\":
            while not (end := _escape_end(reader.text, reader.at, reader.ended)):
                yield
            show(_mended_escape(reader.take(end)))
        elif found != '"':
            show(escape(reader.take(reader.at + 1)))
        elif not strict and (yield from _goes_on(reader)):
            reader.take(reader.at + 1)
            show('\\"')
        else:
            show(reader.take(reader.at + 1))
            return


def _goes_on(reader: Reader) -> Wait[bool]:
    """Whether the quote that comes next is part of its string: text follows it, and another quote on the same line."""
    while True:
        match = _QUOTE_INSIDE.match(reader.text, reader.at + 1, reader.at + _LOOKAHEAD)
        if match:
            return match[1] is not None
        if reader.ended or len(reader.text) - reader.at >= _LOOKAHEAD:
            return False
        yield


def _escape_end(text: str, at: int, ended: bool) -> int:
    """Where the escape at ``at`` ends; 0 if more text must come to tell."""
    if text[at + 1 : at + 2] != "u":
        return at + 2 if at + 1 < len(text) else (len(text) if ended else 0)
    digits = at + 2
    while digits < min(at + 6, len(text)) and text[digits] in _HEX:
        digits += 1
    return 0 if digits == len(text) and digits < at + 6 and not ended else digits


def _mended_escape(written: str) -> str:
    r"""A backslash and what follows it as an escape that JSON has: ``\'`` is a quote, ``\d`` a backslash and a d."""
    kind = written[1:2]
    if kind in _JSON_ESCAPES or (kind == "u" and len(written) == 6) or not kind:
        return written
    if kind == "'":
        return kind
    return escape(kind) if kind < " " else "\\" + written


def rest(reader: Reader, show: Show, opened: str, *, markers: bool = True) -> Wait[None]:
    """Reads what remains of JSON or malformed JSON, to the bracket that closes the first of ``opened``.

    Raises `Malformed` at the end of the text, or if there are ``markers`` at what may be one.
    """
    brackets = list(opened)
    in_string = False
    while brackets:
        found = yield from reader.stream(CONTENTS['"'] if in_string else _BETWEEN_BRACKETS, show)
        if not found or (found == "<" and markers):
            raise Malformed
        show(reader.take(reader.at + 1))
        if found == "\\" and (yield from reader.peek()):
            show(reader.take(reader.at + 1))
        elif found == '"':
            in_string = not in_string
        elif found in "{[":
            brackets.append(found)
        elif found in "}]":
            while brackets and _CLOSING[brackets.pop()] != found:
                pass  # an inner bracket that was never closed


def string(reader: Reader, show: Show, *, triple: bool = False, lenient: bool = False) -> Wait[None]:
    """Reads a string in double or single quotes; ``show`` gets what it says, decoded, in pieces.

    JSON's escapes and Python's; an unknown one stands for itself. ``triple``: Python's tripled quotes too. ``lenient``:
    a quote with a letter after it does not end the string. Halves of a surrogate pair come out as they were written,
    as two characters.
    """
    quote = yield from reader.peek()
    if quote not in CONTENTS:
        raise Malformed
    closer = quote
    if (
        triple
        and reader.text[reader.at + 1 : reader.at + 2] in ("", quote)
        and (yield from reader.literal((quote * 3,)))
    ):
        closer = quote * 3
    else:
        reader.take(reader.at + 1)
    while True:
        found = yield from reader.stream(CONTENTS[quote], show)
        if not found:
            raise Malformed
        if found == "\\":
            simple = _ESCAPES.get(reader.text[reader.at + 1 : reader.at + 2])
            if simple is None:
                yield from _escaped(reader, show)
            else:
                reader.take(reader.at + 2)
                show(simple)
        elif closer == quote:
            while lenient and not reader.text[reader.at + 1 : reader.at + 2] and not reader.ended:
                yield
            if not (lenient and reader.text[reader.at + 1 : reader.at + 2].isalpha()):
                reader.take(reader.at + 1)
                return
            show(reader.take(reader.at + 1))
        elif (yield from reader.literal((closer,))):
            return
        else:  # one or two of three
            show(reader.take(reader.at + 1))


def _escaped(reader: Reader, show: Show) -> Wait[None]:
    reader.take(reader.at + 1)
    kind = yield from reader.peek()
    if not kind:
        raise Malformed
    reader.take(reader.at + 1)
    digits = ""
    if kind in _HEX_DIGITS:
        while len(digits) < _HEX_DIGITS[kind]:
            digit = yield from reader.peek()
            if not digit:
                raise Malformed
            if digit not in _HEX:
                break
            digits += reader.take(reader.at + 1)
        code = int(digits, 16) if len(digits) == _HEX_DIGITS[kind] else -1
        show(chr(code) if 0 <= code <= 0x10FFFF else f"\\{kind}{digits}")
    elif kind in _ESCAPES:
        show(_ESCAPES[kind])
    else:
        show(f"\\{kind}")


def quoted(reader: Reader) -> Wait[str]:
    """A whole string, decoded, surrogate pairs joined."""
    pieces: list[str] = []
    yield from string(reader, pieces.append)
    return joined("".join(pieces))


def joined(text: str) -> str:
    """``text`` with halves of surrogate pairs joined; a half alone becomes U+FFFD."""
    if not _SURROGATE.search(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
