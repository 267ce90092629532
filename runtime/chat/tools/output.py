"""The parser's writing side: puts every character read into exactly one event."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from .definitions import Tool
from .events import ArgumentsDelta, CallEnd, CallStart, ContentDelta, Event, Markup, ReasoningDelta
from .json_values import is_json
from .reader import Malformed, Reader


def long_id() -> str:
    return f"call_{random.getrandbits(96):024x}"


def short_id() -> str:
    return f"{random.getrandbits(36):09x}"


class EventWriter:
    """Collects events. Neighbouring deltas of one kind become one event.

    A call inside reasoning may be one that the model only thinks about. Its events and all that follow are held until
    the reasoning ends: `release` if it never does, `to_reasoning` if it does.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.thinking = False  # whether `text` writes reasoning
        self.structured = False  # some reasoning or a call has been seen
        self.calls = 0
        self._events: list[Event] = []
        self._held: list[Event] | None = None
        self._first_held_call = 0
        self._texts: list[str] = []  # of the delta being collected
        self._kind: type[ContentDelta] | type[ReasoningDelta] | type[ArgumentsDelta] | None = None

    def text(self, _: str = "") -> None:
        """What was read since the last event is text: of the reasoning or of the answer."""
        source = self.reader.drain()
        if source:
            self._collect(ReasoningDelta if self.thinking else ContentDelta, source)

    def markup(self) -> None:
        source = self.reader.drain()
        if source:
            self._emit(Markup(source))

    def start(self, id: str, name: str) -> None:
        self.structured = True
        if self.thinking and self._held is None:
            self._flush()
            self._held, self._first_held_call = [], self.calls
        self._emit(CallStart(self.calls, id, name, self.reader.drain()))

    def arguments(self, text: str) -> None:
        if self._kind is ArgumentsDelta:
            self._texts.append(text)
        else:
            self._collect(ArgumentsDelta, text)

    def end(self, complete: bool) -> None:
        self._flush()
        self._emit(CallEnd(self.calls, complete, self.reader.drain()))
        self.calls += 1

    @property
    def holding(self) -> bool:
        return self._held is not None

    def release(self) -> None:
        """The held events stand as they were read."""
        self._flush()
        self._events += self._held or ()
        self._held = None

    def to_reasoning(self, marker: str) -> None:
        """Turns the held events and the text since, up to ``marker``, into reasoning, less one newline at its end."""
        assert self._held is not None
        self._flush()
        held, self._held = self._held, None
        self.calls = self._first_held_call
        text = ("".join(event.source for event in held) + self.reader.drain()).removesuffix(marker)
        self._collect(ReasoningDelta, text.removesuffix("\n"))
        self._emit(Markup("\n" * text.endswith("\n") + marker))

    def events(self) -> list[Event]:
        """The events since the last call, except those that are held."""
        if self._kind is not None:
            self._flush()
        events, self._events = self._events, []
        return events

    def _collect(self, kind: type[ContentDelta] | type[ReasoningDelta] | type[ArgumentsDelta], text: str) -> None:
        if kind is not self._kind:
            self._flush()
            self._kind = kind
        self._texts.append(text)

    def _emit(self, event: Event) -> None:
        self._flush()
        self._append(event)

    def _append(self, event: Event) -> None:
        (self._events if self._held is None else self._held).append(event)

    def _flush(self) -> None:
        if self._kind is None:
            return
        text = "".join(self._texts)
        if self._kind is ArgumentsDelta:
            self._append(ArgumentsDelta(self.calls, text, self.reader.drain()))
        elif self._kind is ReasoningDelta:
            self._append(ReasoningDelta(text))
        else:
            self._append(ContentDelta(text))
        self._texts.clear()
        self._kind = None


class CallWriter:
    """One call, from its begin marker on.

    Its `CallStart` is written once the name is known; for a ``bare`` call (without a marker, so it may be an ordinary
    answer) once the arguments begin too; with ``hold`` once the call is over and its arguments are valid JSON. Until
    then nothing is written, and what was read can still become text. A call of an unknown tool is written as text if
    ``as_text``.
    """

    def __init__(
        self,
        out: EventWriter,
        tools: Mapping[str, Tool] | None,
        new_id: Callable[[], str],
        *,
        bare: bool = False,
        hold: bool = False,
        as_text: bool = True,
    ) -> None:
        self._out = out
        self._tools = tools
        self._new_id = new_id
        self._hold = hold
        self._as_text = as_text
        self._id = ""
        self._early: list[str] = []  # arguments that came before the start
        self.bare = bare
        self.name = ""
        self.started = False
        self.arguments_begun = False
        self.arguments_done = False
        self.is_text = False  # an unknown tool's, or malformed before it started
        self.shown = False  # started as a call
        self.over = False
        self.malformed = False  # started, then cut short

    @property
    def tool(self) -> Tool | None:
        return self._tools.get(self.name) if self._tools else None

    def named(self, name: str, id: str = "") -> None:
        """The name is known. Raises `Malformed` if it cannot be that of a call."""
        if not name or (self.bare and self._unknown(name)):
            raise Malformed
        self.name, self._id = name, id
        if not self.bare or self.arguments_begun:
            self._start()

    def begin_arguments(self) -> None:
        self.arguments_begun = True
        if self.name and not self.started:
            self._start()

    def arguments(self, text: str) -> None:
        """More JSON text of the arguments."""
        if self.shown:
            self._out.arguments(text)
        elif self.is_text:
            self._out.text()
        else:
            self._early.append(text)

    def sink(self) -> Callable[[str], None]:
        """`arguments`, bound once for a call that has started, so that pieces need no check each."""
        return self._out.arguments if self.shown else self.arguments

    def end(self) -> None:
        """The call is over. Raises `Malformed` if it was none."""
        if self._hold:
            if not self.name or not self.arguments_begun or not is_json("".join(self._early)):
                raise Malformed
            self._hold = False
            self._start()
        if not self.started and (self.bare or not self.name):
            raise Malformed
        if not self.arguments_begun:
            self.begin_arguments()
            self.arguments("{}")
        self._finish(True)

    def fail(self, missing: str = "") -> bool:
        """The text departed from the format, or ended. Returns whether that cut short a call that had started.

        Unless the text has ended, ``missing`` completes the arguments, so that clients can parse them.
        """
        if self.malformed or self.over or not self.started:
            self._out.text()
            self.is_text = self.is_text or not self.started
        else:
            self.malformed = True
            reader = self._out.reader
            if not self.arguments_done and not (reader.ended and reader.at == len(reader.text)):
                self.begin_arguments()
                self.arguments(missing or "{}")
            self._finish(self.arguments_done)
        return self.malformed

    def _unknown(self, name: str) -> bool:
        return self._tools is not None and name not in self._tools

    def _start(self) -> None:
        if self._hold:
            return
        self.started = True
        if self._as_text and self._unknown(self.name):
            self.is_text = True
            self._out.text()
            return
        self.shown = True
        self._out.start(self._id or self._new_id(), self.name)
        if self._early:
            self._out.arguments("".join(self._early))
            self._early.clear()

    def _finish(self, complete: bool) -> None:
        self.over = True
        if self.is_text:
            self._out.text()
        else:
            self._out.end(complete)
