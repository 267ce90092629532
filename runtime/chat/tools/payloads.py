"""Readers of calls, one for each kind of payload. Each reads all calls that stand together.

They end right after the last call, or raise `Malformed` where the text departs from the format: the parser then
decides about the call that was being read.
"""

from __future__ import annotations

import json
import re
from typing import Protocol

from . import json_values, python_values, schema_values
from .formats import FUNCTION, ToolFormat
from .json_values import escape
from .output import CallWriter
from .reader import Malformed, Markers, Reader, Wait

NAME = re.compile(r"[A-Za-z0-9_.\-]+")
_KEYWORD = re.compile(r"[A-Za-z0-9_]+")
_XML_NAME = re.compile(r"[^<>\s]+")
_XML_KEY = re.compile(r"[^<>\n]+")
_ALPHANUMERIC = re.compile(r"[A-Za-z0-9]+")
_BESIDE_ARGUMENTS = ("type", "id")  # what else an envelope without a marker may say before it is sure to be a call

PARAMETER, END_PARAMETER, END_FUNCTION = "<parameter=", "</parameter>", "</function>"
_VALUE_ENDS = Markers((END_PARAMETER, PARAMETER, END_FUNCTION))  # a missing end is made up for by what must follow it


class Calls(Protocol):
    """What the parser does for a payload reader."""

    def open(self, bare: bool = False) -> CallWriter:
        """The next call."""

    def closed(self) -> None:
        """What was read since the last call closes a list of calls."""


def json_calls(reader: Reader, calls: Calls, format: ToolFormat, bare: bool) -> Wait[None]:
    """Envelopes: one, several one after the other, or a list of them."""
    if (yield from reader.space()) != "[":
        yield from _envelope(reader, calls.open(bare), format)
        while True:
            following = yield from reader.space()
            if following and following == format.separator:
                reader.take(reader.at + 1)
                yield from reader.space()
            elif bare or following != "{":
                return
            yield from _envelope(reader, calls.open(bare), format)
    reader.take(reader.at + 1)
    while True:
        yield from reader.space()
        yield from _envelope(reader, calls.open(bare), format)
        if (yield from reader.space()) == "]":
            reader.take(reader.at + 1)
            calls.closed()
            return
        yield from reader.expect(",")


def _envelope(reader: Reader, call: CallWriter, format: ToolFormat) -> Wait[None]:
    yield from reader.expect("{")
    following = yield from reader.space()
    while following != "}":
        key = yield from json_values.quoted(reader)
        yield from reader.space()
        yield from reader.expect(":")
        yield from reader.space()
        if key in format.names and not call.name:
            call.named((yield from json_values.quoted(reader)))
        elif key in format.arguments and not call.arguments_begun:
            yield from json_values.arguments(reader, call, python_values.value)
        else:
            if call.bare and not call.started and key not in _BESIDE_ARGUMENTS:
                raise Malformed
            yield from json_values.skip(reader)
        following = yield from reader.space()
        if following != "}":
            yield from reader.expect(",")
            following = yield from reader.space()
    reader.take(reader.at + 1)
    call.end()


def named_call(reader: Reader, calls: Calls) -> Wait[None]:
    """A name, then its arguments as an object."""
    yield from reader.space()
    call = calls.open()
    name = yield from reader.run(NAME)
    following = yield from reader.space()
    id = ""
    if (yield from reader.literal(("[CALL_ID]",))):
        id = yield from reader.run(_ALPHANUMERIC)
    if not (yield from reader.literal(("[ARGS]",))) and following != "{":
        raise Malformed
    call.named(name, id if len(id) == 9 else "")
    if (yield from reader.space()) != "{":
        raise Malformed
    yield from json_values.arguments(reader, call, python_values.value)
    call.end()


def pythonic_calls(reader: Reader, calls: Calls, bare: bool) -> Wait[None]:
    """A list of function calls with keyword arguments that are literals."""
    yield from reader.space()
    yield from reader.expect("[")
    while True:
        yield from reader.space()
        call = calls.open(bare)
        name = yield from reader.run(NAME)
        yield from reader.space()
        yield from reader.expect("(")
        yield from _keywords(reader, call, name)
        call.end()
        following = yield from reader.space()
        if following == ",":
            reader.take(reader.at + 1)
            following = yield from reader.space()
        elif following != "]":
            raise Malformed
        if following == "]":
            reader.take(reader.at + 1)
            calls.closed()
            return


def _keywords(reader: Reader, call: CallWriter, name: str) -> Wait[None]:
    following = yield from reader.space()
    lead = "{"
    while following != ")":
        key = yield from reader.run(_KEYWORD)
        yield from reader.space()
        yield from reader.expect("=")
        if not key:
            raise Malformed
        if lead == "{":
            call.begin_arguments()
            call.named(name)
        yield from reader.space()
        yield from python_values.value(reader, call.sink(), lead=f"{lead}{json.dumps(key)}: ")
        lead = ", "
        following = yield from reader.space()
        if following == ",":
            reader.take(reader.at + 1)
            following = yield from reader.space()
        elif following != ")":
            raise Malformed
    reader.take(reader.at + 1)
    if lead == "{":
        call.begin_arguments()
        call.named(name)
    call.arguments_done = True
    call.arguments("{}" if lead == "{" else "}")


def xml_calls(reader: Reader, calls: Calls, format: ToolFormat, begin: str) -> Wait[None]:
    """Functions with parameters in tags. ``begin`` is the marker that was read: the first function's or an outer one.

    A parameter's value is text without quotes or escapes, one newline around it left out: its type is what the tool's
    schema says (`schema_values`). Strings are passed on as they arrive, other values once they are whole.
    """
    opened = begin == FUNCTION
    while True:
        if not opened:
            yield from reader.space()
            if not (yield from reader.literal((FUNCTION,))):
                raise Malformed
        opened = False
        call = calls.open()
        name = yield from reader.run(_XML_NAME)
        yield from reader.expect(">")
        call.named(name)
        yield from _parameters(reader, call, format)
        call.end()
        yield from reader.space()
        if not (yield from reader.ahead((FUNCTION,))):
            return


def _parameters(reader: Reader, call: CallWriter, format: ToolFormat) -> Wait[None]:
    lead = "{"
    yield from reader.space()
    while (yield from reader.literal((PARAMETER,))):
        key = yield from reader.run(_XML_KEY)
        yield from reader.expect(">")
        call.begin_arguments()
        call.arguments(f'{lead}"{escape(key)}": ')
        lead = ", "
        yield from _parameter(reader, call, key)
        yield from reader.literal((END_PARAMETER,))
        yield from reader.space()
    if not (yield from reader.ahead(format.end)) and not (yield from reader.literal((END_FUNCTION,))):
        raise Malformed
    call.begin_arguments()
    call.arguments_done = True
    call.arguments("{}" if lead == "{" else "}")


def _parameter(reader: Reader, call: CallWriter, key: str) -> Wait[None]:
    types = schema_values.parameter_types(call.tool, key)
    if types <= {"string", "null"}:
        nulls = [f"{before}null{after}" for before in ("", "\n") for after in (END_PARAMETER, f"\n{END_PARAMETER}")]
        if "null" in types and (yield from reader.ahead(nulls)):
            yield from reader.until(_VALUE_ENDS, lambda _: None)
            call.arguments("null")
            return
        yield from reader.optional("\n")
        call.arguments('"')
        if not (yield from reader.until(_VALUE_ENDS, lambda text: call.arguments(escape(text)), drop_newline=True)):
            raise Malformed
        call.arguments('"')
        return
    yield from reader.optional("\n")
    pieces: list[str] = []
    if not (yield from reader.until(_VALUE_ENDS, pieces.append, drop_newline=True)):
        raise Malformed
    call.arguments(schema_values.typed("".join(pieces), types))
