"""A call's arguments as the ``input`` of a tool_use: always a JSON object, even if the model was cut off."""

from __future__ import annotations

import re
from enum import Enum, auto

_SPACE = re.compile(r"[ \t\r\n]*")
_IN_STRING = re.compile(
    r'(?:[^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u(?![dD][89a-fA-F])[0-9a-fA-F]{4}'
    r"|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})++"
)
_LONGEST_ESCAPE = 12  # characters: a surrogate pair
_WORD = re.compile(r"[0-9A-Za-z+\-.]+")
_SCALAR = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|true|false|null")
_CLOSERS = {"{": "}", "[": "]"}
MAX_DEPTH = 128  # objects and lists inside one another; clients' parsers bound it too
MAX_NUMBER = 1024  # characters


class _Next(Enum):
    OBJECT = auto()
    FIRST_KEY = auto()  # or the end of an object
    KEY = auto()
    COLON = auto()
    FIRST_VALUE = auto()  # or the end of a list
    VALUE = auto()
    COMMA = auto()  # or the end of an object or list
    IN_KEY = auto()
    IN_STRING = auto()
    NOTHING = auto()  # the object is complete, or the text is not JSON


class ToolInput:
    """The longest prefix of the arguments that is a prefix of a JSON object, character for character.

    The rest is left out, or everything if they are no object. Unconstrained models may write such arguments, and
    ``max_tokens`` may end any; the grammar of a strict or forced call writes an object.
    """

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._length = 0
        self._held = ""  # an incomplete escape or number, which may yet turn out to be invalid
        self._next = _Next.OBJECT
        self._open: list[str] = []  # closing brackets of the open objects and lists
        self._whole = 0  # characters up to the last complete value or opening bracket

    def feed(self, text: str) -> str:
        """The text that ``text`` adds to the prefix, for a client that concatenates it."""
        text, at = self._held + text, 0
        if self._next is _Next.OBJECT:
            text = text.lstrip(" \t\r\n")
        while at < len(text) and self._next is not _Next.NOTHING:
            after = self._read(text, at)
            if after == at:
                break
            at = after
        self._held = text[at:] if self._next is not _Next.NOTHING else ""
        self._pieces.append(text[:at])
        self._length += at
        return text[:at]

    @property
    def text(self) -> str:
        """The object: what was fed, without an incomplete last member. Clients' lenient parsers make the same of the
        concatenated text."""
        if not self._length:
            return "{}"
        return "".join(self._pieces)[: self._whole] + "".join(reversed(self._open))

    def _read(self, text: str, at: int) -> int:
        """The end of the next complete token; ``at`` if it is incomplete or invalid."""
        if self._next in (_Next.IN_KEY, _Next.IN_STRING):
            return self._read_string(text, at)
        space = _SPACE.match(text, at)
        if space and space.end() > at:
            return space.end()
        character = text[at]
        match self._next:
            case _Next.FIRST_KEY | _Next.KEY if character == '"':
                self._next = _Next.IN_KEY
            case _Next.COLON if character == ":":
                self._next = _Next.VALUE
            case _Next.COMMA if character == ",":
                self._next = _Next.KEY if self._open[-1] == "}" else _Next.VALUE
            case _Next.FIRST_KEY | _Next.FIRST_VALUE | _Next.COMMA if character == self._open[-1]:
                self._open.pop()
                self._done(at + 1)
            case _Next.VALUE | _Next.FIRST_VALUE if character == '"':
                self._next = _Next.IN_STRING
            case _Next.OBJECT | _Next.VALUE | _Next.FIRST_VALUE if self._opens(character):
                self._open.append(_CLOSERS[character])
                self._next = _Next.FIRST_KEY if character == "{" else _Next.FIRST_VALUE
                self._whole = self._length + at + 1
            case _Next.VALUE | _Next.FIRST_VALUE:
                return self._read_word(text, at)
            case _:
                return self._wrong(at)
        return at + 1

    def _opens(self, character: str) -> bool:
        return character in ("{" if self._next is _Next.OBJECT else "{[") and len(self._open) < MAX_DEPTH

    def _read_string(self, text: str, at: int) -> int:
        inside = _IN_STRING.match(text, at)
        if inside:
            return inside.end()
        if text[at] == '"':
            if self._next is _Next.IN_KEY:
                self._next = _Next.COLON
            else:
                self._done(at + 1)
            return at + 1
        if text[at] == "\\" and len(text) - at < _LONGEST_ESCAPE:
            return at
        return self._wrong(at)

    def _read_word(self, text: str, at: int) -> int:
        word = _WORD.match(text, at)
        if word and word.end() == len(text) <= at + MAX_NUMBER:
            return at
        if word is None or not _SCALAR.fullmatch(word[0]) or len(word[0]) > MAX_NUMBER:
            return self._wrong(at)
        self._done(word.end())
        return word.end()

    def _done(self, at: int) -> None:
        """A value ends at ``at``."""
        self._whole = self._length + at
        self._next = _Next.COMMA if self._open else _Next.NOTHING

    def _wrong(self, at: int) -> int:
        self._next = _Next.NOTHING
        return at
