"""Outputs of several messages, each with a channel: `format_types.Channels`, OpenAI's harmony."""

from __future__ import annotations

import re
from typing import Protocol

from .arguments import arguments
from .format_types import Channels
from .output import CallWriter, EventWriter
from .reader import Malformed, Markers, Reader, Wait

_NAME = re.compile(r"[^\s<]+")


class Parser(Protocol):
    """The part of `StreamParser` that this reader uses."""

    def open(self) -> CallWriter:
        """The next call."""


class ChannelReader:
    """Reads the messages of one output.

    Text without a header is content: a constrained answer may have none. So is a call where ``calls`` is false, which
    keeps its header, and the text of ``form.thinking`` where ``thoughts`` is false.
    """

    def __init__(
        self, reader: Reader, out: EventWriter, parser: Parser, form: Channels, *, calls: bool, thoughts: bool
    ) -> None:
        self._reader, self._out, self._parser, self._form = reader, out, parser, form
        self._takes_calls, self._takes_thoughts = calls, thoughts
        self._header_ends = Markers((form.message, *form.ends))
        self._body_ends = Markers((form.start, form.channel, *form.ends))
        self._openings = (form.start, form.channel, form.message, form.recipient)

    def read(self) -> Wait[None]:
        """Reads the whole output."""
        reader, out, form = self._reader, self._out, self._form
        opened = False  # whether anything but whitespace has been read
        while True:
            yield from reader.space()
            if not opened and not (yield from reader.ahead(self._openings)):
                yield from reader.until(self._body_ends, out.text)
            opened = True
            following = yield from reader.ahead((*self._openings, *form.ends))
            if following in form.ends:
                reader.take(reader.at + len(following))
                out.markup()
            elif following:
                yield from self._message()
            elif (yield from reader.peek()):  # behind the end of a message
                yield from reader.until(self._body_ends, out.text)
            else:
                out.markup()
                return

    def _message(self) -> Wait[None]:
        reader, out, form = self._reader, self._out, self._form
        pieces: list[str] = []
        found = yield from reader.until(self._header_ends, pieces.append)
        if found != form.message:  # the output ended in a header
            out.markup()
            return
        reader.take(reader.at + len(found))
        header = "".join(pieces)
        recipient = _behind(header, form.recipient)
        if recipient and self._takes_calls:
            yield from self._call(recipient.removeprefix(form.namespace))
            return
        out.text() if recipient else out.markup()
        out.thinking = self._takes_thoughts and _behind(header, form.channel) == form.thinking
        out.structured = True
        yield from reader.until(self._body_ends, out.text)
        out.thinking = False

    def _call(self, name: str) -> Wait[None]:
        reader = self._reader
        call = self._parser.open()
        call.named(name)
        try:
            yield from reader.space()
            yield from arguments(reader, call)
            call.end()
            yield from reader.space()
        except Malformed as error:
            call.fail(error.missing)
        if call.is_text:
            self._out.text()
        yield from reader.until(self._body_ends, self._out.text)


def _behind(header: str, marker: str) -> str:
    """The name behind ``marker`` in a header; "" if there is none."""
    _, _, rest = header.partition(marker)
    found = _NAME.match(rest)
    return found[0] if found else ""
