"""A call's arguments as the ``input`` of a tool_use, which must be an object, however far the model came with them."""

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
    COMMA = auto()  # or the end of what is open
    IN_KEY = auto()
    IN_STRING = auto()
    NOTHING = auto()  # the object is whole, or what came is not JSON


class ToolInput:
    """The longest beginning of the arguments that is the beginning of a JSON object, character for character.

    What follows, or everything where they are no object, is left out. The grammar of a strict or forced call never
    writes such arguments; a model on its own may, and any model whose ``max_tokens`` are used up.
    """

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._length = 0
        self._held = ""  # what may yet turn out to be wrong: an escape or a number in the making
        self._next = _Next.OBJECT
        self._open: list[str] = []  # the closers of what is open
        self._whole = 0  # characters up to the last value that is whole, or bracket that opened

    def feed(self, text: str) -> str:
        """What the arguments go on with, for a client that adds up their text."""
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
        """A whole object: what was fed, without a last member that is not whole. It is what clients make of `feed`'s
        text when there is no more of it."""
        if not self._length:
            return "{}"
        return "".join(self._pieces)[: self._whole] + "".join(reversed(self._open))

    def _read(self, text: str, at: int) -> int:
        """To the end of the next token that is whole; ``at`` where more must come first, or nothing may."""
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
