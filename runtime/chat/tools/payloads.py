"""Readers of calls, one for each kind of payload. Each reads all calls of one group.

They end right after the last call, or raise `Malformed` where the text departs from the format: the parser then
decides about the call that was being read. A malformed call of several does not end the reading: the rest of it is
text, and the calls after it are calls.
"""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Protocol

from . import json_values, schema_values
from .arguments import arguments
from .format_types import Tags, ToolFormat
from .json_values import escape
from .output import CallWriter
from .reader import Malformed, Markers, Reader, Wait
from .values import value

NAME = re.compile(r"[A-Za-z0-9_.\-]+")
_KEYWORD = re.compile(r"[A-Za-z0-9_]+")
_TAG_NAME = re.compile(r"[^<>\"\s]+")
_TAG_KEY = re.compile(r"[^<>\"\n]+")
_PARTS = re.compile(r"<[^>]*>|[^\s<]+")  # of `Tags.key_end`: whitespace may stand between them
_ALPHANUMERIC = re.compile(r"[A-Za-z0-9]+")
_DIGITS = re.compile(r"[0-9]+")
_BESIDE_ARGUMENTS = ("type", "id")  # what else an envelope without a marker may say before it is sure to be a call


class Calls(Protocol):
    """The part of the parser that payload readers use."""

    def open(self) -> CallWriter:
        """The next call."""

    def text(self, _: str = "") -> None:
        """What was read since the last event is text."""

    def closed(self) -> None:
        """What was read since the last call closes a list of calls."""


def json_calls(reader: Reader, calls: Calls, format: ToolFormat, bare: bool) -> Wait[None]:
    """Envelopes: one, several one after the other, or a list of them."""
    if (yield from reader.space()) == "[":
        yield from _json_list(reader, calls, format, bare)
        return
    yield from _envelope(reader, calls, format)
    while True:
        following = yield from reader.space()
        if following and following == format.separator:
            reader.take(reader.at + 1)
            yield from reader.space()
        elif bare or following != "{":
            return
        yield from _envelope(reader, calls, format)


def _json_list(reader: Reader, calls: Calls, format: ToolFormat, bare: bool) -> Wait[None]:
    reader.take(reader.at + 1)
    while True:
        following = yield from reader.space()
        if bare and following != "{":  # some other list: calls are not looked for in it
            calls.open().fail()
            yield from json_values.rest(reader, calls.text, "[", markers=False)
            return
        yield from _envelope(reader, calls, format)
        if (yield from reader.space()) == "]":
            reader.take(reader.at + 1)
            calls.closed()
            return
        yield from reader.expect(",")


def _envelope(reader: Reader, calls: Calls, format: ToolFormat) -> Wait[None]:
    call = calls.open()
    yield from reader.expect("{")
    opened = "{"
    try:
        yield from _fields(reader, call, format)
        reader.take(reader.at + 1)
        opened = ""
        call.end()
    except Malformed as error:
        call.fail(error.missing)
        if opened:  # an ordinary answer without a marker is JSON
            yield from json_values.rest(reader, calls.text, opened + error.opened, markers=not call.bare)


def _fields(reader: Reader, call: CallWriter, format: ToolFormat) -> Wait[None]:
    """An envelope's fields, up to its closing brace."""
    following = yield from reader.space()
    while following != "}":
        key = yield from json_values.quoted(reader)
        yield from reader.space()
        yield from reader.expect(":")
        yield from reader.space()
        if not format.names and not call.name:
            call.named(key)
            yield from arguments(reader, call)
        elif key in format.names and not call.name:
            call.named((yield from json_values.quoted(reader)))
        elif key in format.arguments and not call.arguments_begun:
            yield from arguments(reader, call)
        else:
            decided = call.name and call.arguments_begun
            if call.bare and not decided and key not in _BESIDE_ARGUMENTS:
                raise Malformed
            yield from value(reader, lambda _: None, json=True, strict=call.bare)
        following = yield from reader.space()
        if following != "}":
            yield from reader.expect(",")
            following = yield from reader.space()


def named_call(reader: Reader, calls: Calls, format: ToolFormat) -> Wait[None]:
    """A name, then its arguments as an object."""
    call = calls.open()
    name = yield from reader.run(NAME)
    id = ""
    if (yield from reader.optional(":")):
        index = yield from reader.run(_DIGITS)
        id = f"{name}:{index}"
        name = name.removeprefix("functions.")
    following = yield from reader.space()
    if format.call_id and (yield from reader.literal((format.call_id,))):
        id = yield from reader.run(_ALPHANUMERIC)
    between = yield from reader.literal(format.between)
    if not between and following != "{":
        raise Malformed
    call.named(name, "" if format.short_ids and len(id) != 9 else id)
    while between:
        following = yield from reader.space()
        between = yield from reader.literal(format.between)
    if following != "{":
        raise Malformed
    yield from arguments(reader, call, format.quote)
    call.end()


def pythonic_calls(reader: Reader, calls: Calls, bare: bool) -> Wait[None]:
    """Function calls with keyword arguments that are literals: a list, or after a marker one after the other."""
    listed = (yield from reader.space()) == "["
    if listed:
        reader.take(reader.at + 1)
        yield from reader.space()
    elif bare:
        raise Malformed
    while True:
        yield from _function(reader, calls)
        following = yield from reader.space()
        if following == "," or (not listed and following == ";"):
            reader.take(reader.at + 1)
            following = yield from reader.space()
        elif listed and following != "]":
            raise Malformed
        if listed and following == "]":
            reader.take(reader.at + 1)
            calls.closed()
            return
        if not listed and not NAME.match(following):
            return


def _function(reader: Reader, calls: Calls) -> Wait[None]:
    call = calls.open()
    name = yield from reader.run(NAME)
    if (yield from reader.space()) == "=":  # the call's result is assigned
        reader.take(reader.at + 1)
        yield from reader.space()
        name = yield from reader.run(NAME)
        yield from reader.space()
    yield from reader.expect("(")
    if name == "print" and call.tool is None:  # Gemma 3's examples print what a call returns
        yield from reader.space()
        yield from _function(reader, calls)
        yield from reader.space()
        yield from reader.expect(")")
        return
    try:
        yield from _keywords(reader, call, name.removeprefix("default_api.").removesuffix(".call"))
        call.end()
    except Malformed as error:
        call.fail(error.missing)
        depth = 1
        while depth:  # the rest of the call is text
            found = yield from reader.until(_PARENTHESES, calls.text)
            if not found:
                raise
            reader.take(reader.at + 1)
            depth += 1 if found == "(" else -1
        calls.text()


_PARENTHESES = Markers(("(", ")"))


def _keywords(reader: Reader, call: CallWriter, name: str) -> Wait[None]:
    following = yield from reader.space()
    lead = "{"
    try:
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
            yield from value(reader, call.sink(), lead=f"{lead}{json.dumps(key)}: ")
            lead = ", "
            following = yield from reader.space()
            if following == ",":
                reader.take(reader.at + 1)
                following = yield from reader.space()
            elif following != ")":
                raise Malformed
    except Malformed as error:
        raise Malformed(missing=error.missing + "}" if error.missing or lead != "{" else "{}") from error
    reader.take(reader.at + 1)
    if lead == "{":
        call.begin_arguments()
        call.named(name)
    call.arguments_done = True
    call.arguments("{}" if lead == "{" else "}")


def tagged_calls(reader: Reader, calls: Calls, format: ToolFormat, begin: str) -> Wait[None]:
    """Functions with parameters in tags. ``begin`` is the marker that was read: the first function's or an outer one.

    A parameter's value is text without quotes or escapes: its type is the one in the tool's schema (`schema_values`).
    Strings are passed on as they arrive, other values once they are complete.
    """
    tags = format.tags
    assert tags is not None
    opened = begin == tags.function
    while True:
        yield from reader.space()
        if tags.function and not opened and not (yield from reader.literal((tags.function,))):
            raise Malformed
        opened = False
        call = calls.open()
        name = yield from reader.run(_TAG_NAME if tags.function else NAME)
        if tags.name_end:
            if not (yield from reader.literal((tags.name_end,))):
                raise Malformed
        else:
            yield from reader.space()
            if not (yield from reader.ahead((tags.parameter, *format.end))):
                raise Malformed
        call.named(name)
        yield from _parameters(reader, call, format, tags)
        call.end()
        yield from reader.space()
        if not tags.function or not (yield from reader.ahead((tags.function,))):
            return


def _parameters(reader: Reader, call: CallWriter, format: ToolFormat, tags: Tags) -> Wait[None]:
    lead = "{"
    yield from reader.space()
    while (yield from reader.literal((tags.parameter,))):
        key = yield from reader.run(_TAG_KEY)
        declared = yield from reader.literal(tags.declares)
        for part in _PARTS.findall(tags.key_end):
            yield from reader.space()
            if not (yield from reader.literal((part,))):
                raise Malformed(missing="{}" if lead == "{" else "}")
        call.begin_arguments()
        call.arguments(f'{lead}"{escape(key)}": ')
        lead = ", "
        types = schema_values.parameter_types(call.tool, key)
        if declared:
            types = schema_values.declared_types(types, declared == tags.declares[0])
        yield from _parameter(reader, call, types, tags, _value_ends(format))
        yield from reader.literal((tags.value_end,))
        yield from reader.space()
    end = yield from reader.ahead(format.end)
    if not end and not (tags.function_end and (yield from reader.literal((tags.function_end,)))):
        raise Malformed(missing="{}" if lead == "{" else "}")
    call.begin_arguments()
    call.arguments_done = True
    call.arguments("{}" if lead == "{" else "}")


@cache
def _value_ends(format: ToolFormat) -> Markers:
    """The end of a value: its end tag, or if that is missing, the tag that must follow it."""
    assert format.tags is not None
    tags = format.tags
    ends = (tags.value_end, tags.parameter, *((tags.function_end,) if tags.function_end else format.end))
    return Markers(dict.fromkeys(ends, int(tags.padded)))


def _parameter(reader: Reader, call: CallWriter, types: frozenset[str], tags: Tags, ends: Markers) -> Wait[None]:
    padding = ("", "\n") if tags.padded else ("",)
    if types <= {"string", "null"}:
        nulls = [f"{before}null{after}{tags.value_end}" for before in padding for after in padding]
        if "null" in types and (yield from reader.ahead(nulls)):
            yield from reader.until(ends, lambda _: None)
            call.arguments("null")
            return
        if tags.padded:
            yield from reader.optional("\n")
        call.arguments('"')
        if not (yield from reader.until(ends, lambda text: call.arguments(escape(text)))):
            raise Malformed
        call.arguments('"')
        return
    if tags.padded:
        yield from reader.optional("\n")
    pieces: list[str] = []
    if not (yield from reader.until(ends, pieces.append)):
        raise Malformed
    call.arguments(schema_values.typed("".join(pieces), types))
