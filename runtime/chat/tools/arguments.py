"""The value of a call's arguments, in the forms in which models write it."""

from __future__ import annotations

from .json_values import CONTENTS, escape, joined, string
from .output import CallWriter
from .reader import Malformed, Reader, Wait
from .values import value

_PYTHON_DICTS = ("{'", "{ '", "{\n'")


def arguments(reader: Reader, call: CallWriter, quote: str = "") -> Wait[None]:
    """Reads the value of a call's arguments.

    A string that begins like an object or a list holds arguments encoded twice: its content passes. Any other string
    passes as a JSON string. ``null`` and an empty string are ``{}``. Other values pass as `value` reads them.
    """
    first = yield from reader.peek()
    if not first:
        raise Malformed
    call.begin_arguments()
    if first in CONTENTS:
        content = _StringContent(call)
        try:
            yield from string(reader, content)
        except Malformed:
            content.close(complete=False)
            raise
        content.close(complete=True)
    elif first in "{[":
        strict = call.bare and not (yield from reader.ahead(_PYTHON_DICTS))
        yield from value(reader, call.sink(), quote=quote, json=True, strict=strict)
    else:
        word: list[str] = []
        yield from value(reader, word.append, strict=call.bare)
        call.arguments("{}" if word == ["null"] else "".join(word))
    call.arguments_done = True


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
        self._malformed: Malformed | None = None

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
                raise self._malformed or Malformed

    def _add(self, text: str) -> None:
        if not self._is_string and self._reading is None:
            text = self._undecided + text
            first = text.lstrip(" \t\r\n")[:1]
            if not first:
                self._undecided = text
                return
            if first in "{[":
                text = text.lstrip(" \t\r\n")
                self._reading = value(self._nested, self._show, json=True, strict=self._call.bare)
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
        except Malformed as error:
            self._malformed = error
