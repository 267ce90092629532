"""The events of a model's output.

The accounting rule. Every event has a ``source``: the characters of the output it stands for. The sources of all
events, in order, are the output, character for character. A `ContentDelta`'s or `ReasoningDelta`'s source is its text.
A call's source, over its three kinds of event, is everything that the model wrote for that call: the whitespace before
it, its begin marker, its name, its arguments, and all text between and after them. `Markup` is the rest: the
markers around reasoning with the newlines that templates put beside them, and after a call its end marker, its list's
closing bracket and whitespace.
"""

from __future__ import annotations

from typing import ClassVar, TypeAlias

import msgspec


class ContentDelta(msgspec.Struct, frozen=True, gc=False):
    """Text of the answer, verbatim."""

    text: str

    @property
    def source(self) -> str:
        return self.text


class ReasoningDelta(msgspec.Struct, frozen=True, gc=False):
    """Text of the model's thinking, verbatim."""

    text: str

    @property
    def source(self) -> str:
        return self.text


class CallStart(msgspec.Struct, frozen=True, gc=False):
    """A call begins. ``index`` counts calls from 0."""

    index: int
    id: str
    name: str
    source: str


class ArgumentsDelta(msgspec.Struct, frozen=True, gc=False):
    """More of the arguments, as JSON text: the model's own characters where the format is JSON."""

    index: int
    text: str
    source: str


class CallEnd(msgspec.Struct, frozen=True, gc=False):
    """A call is over. Not ``complete``: the output ended, or left the format, inside its arguments."""

    index: int
    complete: bool
    source: str


class Markup(msgspec.Struct, frozen=True, gc=False):
    """Text that belongs to none of the above."""

    source: str
    text: ClassVar[str] = ""


Event: TypeAlias = ContentDelta | ReasoningDelta | CallStart | ArgumentsDelta | CallEnd | Markup
