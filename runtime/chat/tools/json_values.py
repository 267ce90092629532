"""JSON as models write it: scanned as it arrives and passed on as it is, never parsed and written again."""

from __future__ import annotations

import re
from collections.abc import Callable
from json.encoder import encode_basestring

from .output import CallWriter
from .reader import SPACE, Malformed, Reader, Show, Wait

_PLAIN = re.compile(r"[ \t\r\n0-9A-Za-z+\-.:,]+")  # outside strings, between brackets
_IN_STRING = re.compile(r'[^"\\]+')
_WORD = re.compile(r"[0-9A-Za-z+\-._]+")
_CONTENTS = {quote: re.compile(rf"[^{quote}\\]+") for quote in "\"'"}
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


def container(reader: Reader, show: Show, opened: str = "") -> Wait[None]:
    """Reads an object or a list to its closing bracket. ``opened``: an opening bracket already read.

    Keeps to what needs no memory but the brackets: what is between them may be wrong JSON and passes. Raises
    `Malformed` at a bracket that does not fit, or at a character JSON has only in strings.
    """
    closers = ["}" if bracket == "{" else "]" for bracket in opened]
    in_string = wrong = False
    while True:
        text, at = reader.text, reader.at
        end = len(text)
        while at < end:
            match = (_IN_STRING if in_string else _PLAIN).match(text, at)
            if match:
                at = match.end()
                continue
            character = text[at]
            if in_string and character == "\\":
                if at + 1 == end and not reader.ended:
                    break  # what it escapes is not here yet
                at = min(at + 2, end)
                continue
            if character == '"':
                in_string = not in_string
            elif character == "{":
                closers.append("}")
            elif character == "[":
                closers.append("]")
            elif closers and character == closers[-1]:
                closers.pop()
                if not closers:
                    show(reader.take(at + 1))
                    return
            else:
                wrong = True
                break
            at += 1
        if at > reader.at:
            show(reader.take(at))
        if wrong or reader.ended:
            raise Malformed
        yield


def string(reader: Reader, show: Show, *, triple: bool = False) -> Wait[None]:
    """Reads a string in double or single quotes; ``show`` gets what it says, decoded, in pieces.

    JSON's escapes and Python's; an unknown one stands for itself. ``triple``: Python's tripled quotes too. Halves of a
    surrogate pair come out as they were written, as two characters.
    """
    quote = yield from reader.peek()
    if quote not in _CONTENTS:
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
        found = yield from reader.stream(_CONTENTS[quote], show)
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
            reader.take(reader.at + 1)
            return
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
    return _joined("".join(pieces))


def _joined(text: str) -> str:
    if not _SURROGATE.search(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def skip(reader: Reader) -> Wait[None]:
    """Reads any value and shows it nobody."""
    first = yield from reader.peek()
    if first in ("{", "["):
        yield from container(reader, _nobody)
    elif first in _CONTENTS:
        yield from string(reader, _nobody)
    elif not (yield from reader.run(_WORD)):
        raise Malformed


def _nobody(_: str) -> None:
    pass


class _PairJoiner:
    """Joins surrogate pairs that arrive as two pieces."""

    def __init__(self, show: Show) -> None:
        self._show = show
        self._high = ""
        self.empty = True

    def __call__(self, text: str) -> None:
        if not text:
            return
        self.empty = False
        text, self._high = self._high + text, ""
        if "\ud800" <= text[-1:] <= "\udbff":
            text, self._high = text[:-1], text[-1]
        if text:
            self._show(_joined(text))

    def close(self) -> None:
        if self._high:
            self._show("\ufffd")


def arguments(reader: Reader, call: CallWriter, python: Callable[[Reader, Show, str], Wait[None]]) -> Wait[None]:
    """Reads the value of a call's arguments.

    Objects and lists pass as they are written; one in Python's quotes is converted by ``python``. A string is taken
    for arguments encoded twice: what it says passes. ``null`` and an empty string are ``{}``.
    """
    first = yield from reader.peek()
    if not first:
        raise Malformed
    if first == "{":
        opened = reader.take(reader.at + 1)
        blank = yield from reader.run(SPACE)
        following = yield from reader.peek()
        call.begin_arguments()
        if following == "'":
            yield from python(reader, call.sink(), opened + blank)
        else:
            call.arguments(opened + blank)
            yield from container(reader, call.sink(), opened)
    elif first == "[":
        call.begin_arguments()
        yield from container(reader, call.sink())
    elif first in _CONTENTS:
        call.begin_arguments()
        joiner = _PairJoiner(call.sink())
        try:
            yield from string(reader, joiner)
        except Malformed:
            joiner.close()
            raise
        joiner.close()
        if joiner.empty:
            call.arguments("{}")
    else:
        word = yield from reader.run(_WORD)
        if not word:
            raise Malformed
        call.begin_arguments()
        cut = reader.ended and reader.at == len(reader.text)
        call.arguments("{}" if word in ("null", "None") and not cut else word)
        if cut:
            raise Malformed
    call.arguments_done = True
