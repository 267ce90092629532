"""The value of a call's arguments, in the forms in which models write it."""

from __future__ import annotations

from . import python_values
from .json_values import CONTENTS, WORD, container, escape, joined, string
from .output import CallWriter
from .reader import SPACE, Malformed, Reader, Wait


def arguments(reader: Reader, call: CallWriter, quote: str = "") -> Wait[None]:
    """Reads the value of a call's arguments.

    Objects and lists pass as they are written; an object in Python's quotes, or with bare keys and strings in
    ``quote``, becomes JSON. A string that begins like an object or a list holds arguments encoded twice: its content
    passes. Any other string passes as a JSON string. ``null`` and an empty string are ``{}``.
    """
    first = yield from reader.peek()
    if not first:
        raise Malformed
    if first in "{[":
        yield from _container(reader, call, quote)
    elif first in CONTENTS:
        call.begin_arguments()
        content = _StringContent(call)
        try:
            yield from string(reader, content)
        except Malformed:
            content.close(complete=False)
            raise
        content.close(complete=True)
    else:
        word = yield from reader.run(WORD)
        if not word:
            raise Malformed
        call.begin_arguments()
        if reader.ended and reader.at == len(reader.text):  # cut off
            call.arguments(word)
            raise Malformed
        value = python_values.scalar(word)
        call.arguments("{}" if value == "null" else value)
    call.arguments_done = True


def _container(reader: Reader, call: CallWriter, quote: str = "") -> Wait[None]:
    opened = reader.take(reader.at + 1)
    blank = yield from reader.run(SPACE)
    following = yield from reader.peek()
    call.begin_arguments()
    if opened == "{" and (following == "'" or quote):
        yield from python_values.value(reader, call.sink(), opened + blank, quote=quote)
    else:
        call.arguments(opened + blank)
        yield from container(reader, call.sink(), opened)


class _StringContent:
    """Takes the decoded content of a string in pieces and passes it on as arguments."""

    def __init__(self, call: CallWriter) -> None:
        self._call = call
        self._show = call.sink()
        self._undecided = ""  # whitespace so far: a container or a string may follow
        self._high = ""  # the first half of a surrogate pair
        self._is_string = False
        self._nested = Reader()
        self._reading: Wait[None] | None = None  # of the container in the string
        self._malformed = False

    def __call__(self, text: str) -> None:
        text, self._high = self._high + text, ""
        if "\ud800" <= text[-1:] <= "\udbff":
            text, self._high = text[:-1], text[-1]
        self._add(joined(text))

    def close(self, *, complete: bool) -> None:
        """The string has ended, or if not ``complete`` was cut off. Raises `Malformed` for a container that has not."""
        if self._high:
            self._add("\ufffd")
        if self._is_string:
            self._show('"' if complete else "")
        elif self._reading is None:
            self._call.arguments("{}" if complete else "")
        else:
            self._nested.ended = True
            self._advance()
            if self._malformed or self._nested.text[self._nested.at :].strip():
                raise Malformed

    def _add(self, text: str) -> None:
        if not self._is_string and self._reading is None:
            text = self._undecided + text
            first = text.lstrip(" \t\r\n")[:1]
            if not first:
                self._undecided = text
                return
            if first in "{[":
                text = text.lstrip(" \t\r\n")
                self._reading = _container(self._nested, self._call)
            else:
                self._is_string = True
                self._show('"')
        if self._is_string:
            self._show(escape(text))
        else:
            self._nested.push(text)
            self._advance()

    def _advance(self) -> None:
        assert self._reading is not None
        try:
            if not self._malformed:
                next(self._reading, None)
        except Malformed:
            self._malformed = True
