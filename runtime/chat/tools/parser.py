"""Splits a model's output into content, reasoning and tool calls, as it arrives.

The rules:

- A call starts as soon as its name is known. Text that looks like a call and departs from the format before that is
  content, including its markers; reading continues right behind it. JSON without a marker, which may be an ordinary
  answer, starts only once it is complete and valid.
- A call that started remains one. If its arguments leave the format or the output ends, `CallEnd` says that it is not
  complete, and nothing is made up: no closing brace, no missing value. What follows is content.
- A call without arguments, or whose arguments are ``null``, has ``{}``.
- A call of an unknown tool is content, as a whole, or a call like others (``unknown_tools``).
- Whitespace around and between calls, where nothing else is written, belongs to them. Any other stays in the content.
- Reasoning begins where only whitespace came before it (in the message, or since the last reasoning or call); a
  marker elsewhere is text. A lone end marker there, of reasoning that is empty, is dropped.
- Markers around an answer are dropped: the first behind reasoning or, if the format has such answers, where reasoning
  could begin; the last if the first was there.
- A call inside reasoning is part of it if the reasoning is closed later. If it never is, the model left it out: the
  reasoning ended before the call. Events are held until one or the other is certain.

`events` has the rule that accounts for every character.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal

from . import payloads
from .channels import ChannelReader
from .definitions import Tool
from .events import Event
from .format_types import ReasoningFormat, ToolFormat
from .formats import tool_format
from .output import CallWriter, EventWriter, long_id, short_id
from .reader import Malformed, Markers, Reader, Wait
from .reasoning_formats import reasoning_format


class StreamParser:
    """One output: `feed` its pieces, then `finish`.

    ``tools``: the tools the model was given; None takes any name for a tool's. ``reasoning_open``: the prompt ended
    inside reasoning (`detect.ends_in_reasoning`). ``unknown_tools``: what a call of another tool is. ``new_id`` makes
    call ids. Raises ValueError for formats whose markers cannot be told apart.

    Costs time linear in the text, however it is cut, and memory for what cannot be decided yet.
    """

    def __init__(
        self,
        tools_format: ToolFormat | str | None,
        reasoning: ReasoningFormat | str | None = None,
        tools: Sequence[Tool] | None = None,
        *,
        reasoning_open: bool = False,
        unknown_tools: Literal["content", "call"] = "content",
        new_id: Callable[[], str] | None = None,
    ) -> None:
        self._format = tool_format(tools_format) if isinstance(tools_format, str) else tools_format
        self._reasoning = reasoning_format(reasoning) if isinstance(reasoning, str) else reasoning
        if reasoning_open and self._reasoning is None:
            raise ValueError("reasoning_open needs a reasoning format")
        self._tools = None if tools is None else {tool.name: tool for tool in tools}
        self._unknown_as_text = unknown_tools == "content"
        short = self._format is not None and self._format.short_ids
        self._new_id = new_id or (short_id if short else long_id)
        begins = self._format.begin if self._format else ()
        self._bare = tuple(self._format.bare) if self._format else ()
        thoughts = (self._reasoning.begin, self._reasoning.end) if self._reasoning else ()
        answer, answer_end = (self._reasoning.answer, self._reasoning.answer_end) if self._reasoning else ("", "")
        self._answers = tuple(filter(None, (answer, answer_end)))
        self._in_answer = False  # its end marker may follow
        self._openings = Markers(thoughts + self._answers + begins + self._bare)
        anywhere = dict.fromkeys(begins + (self._bare if self._format and self._format.anywhere else ()), 0)
        anywhere |= {answer_end: 1} if answer_end else {}
        self._in_content = Markers(anywhere)
        self._after_held_call = Markers(anywhere | dict.fromkeys(thoughts[1:], 0))
        self._in_thinking = Markers(dict.fromkeys(thoughts[1:], 1) | dict.fromkeys(begins + self._bare, 2))
        self._reader = Reader()
        self._out = EventWriter(self._reader)
        self._call: CallWriter | None = None
        self._hold_call = False
        self._bare_call = False
        forms = (each.channels for each in (self._format, self._reasoning) if each is not None)
        channels = next((form for form in forms if form is not None), None)
        if channels is None:
            self._reading = self._read(reasoning_open)
        else:
            reads = {"calls": self._format is not None, "thoughts": self._reasoning is not None}
            self._reading = ChannelReader(self._reader, self._out, self, channels, **reads).read()
        self._finished = False
        next(self._reading, None)

    def feed(self, text: str) -> list[Event]:
        """The events that ``text`` adds. Raises ValueError after `finish`."""
        if self._finished:
            raise ValueError("fed after finish")
        if not text:
            return []
        self._reader.push(text)
        next(self._reading)
        return self._out.events()

    def finish(self) -> list[Event]:
        """No more text will come: the events held back so far. Nothing if called again."""
        if not self._finished:
            self._finished = True
            self._reader.ended = True
            for _ in self._reading:
                raise AssertionError("a reader asks for text after the end")
            self._out.release()
        return self._out.events()

    def _read(self, reasoning_open: bool) -> Wait[None]:
        begin, end = (self._reasoning.begin, self._reasoning.end) if self._reasoning else ("", "")
        fresh = True  # only whitespace since the start, the last reasoning or the last call
        if reasoning_open:
            fresh = yield from self._think(opened=True)
        while True:
            if fresh:
                yield from self._reader.space()
                found = yield from self._reader.ahead(self._openings.all)
            else:
                markers = self._after_held_call if self._out.holding else self._in_content
                found = yield from self._reader.until(markers, self._out.text)
            if found not in self._bare:
                self._reader.take(self._reader.at + len(found))
            if not found:
                if not (yield from self._reader.peek()):
                    break
                self._out.text()
                fresh = False
            elif found == begin:
                self._out.release()  # reasoning begins anew: it had ended before the call
                fresh = yield from self._think(opened=False)
            elif found == end:
                yield from self._end_thinking(found)
                fresh = True
            elif found in self._answers:
                fresh = yield from self._answer_marker(found)
            else:
                fresh = yield from self._calls(found)
        if fresh and self._out.structured:
            self._out.markup()
        else:
            self._out.text()

    def _think(self, *, opened: bool) -> Wait[bool]:
        """Reads reasoning to its end, or to a call after which it may have ended. Its begin marker has been read unless
        ``opened`` by the prompt. Returns whether only whitespace came since."""
        assert self._reasoning is not None
        self._out.structured = self._out.thinking = True
        if opened:
            yield from self._reader.literal((self._reasoning.begin,))  # some models repeat it
        yield from self._reader.optional("\n")
        self._out.markup()
        while True:
            found = yield from self._reader.until(self._in_thinking, self._out.text)
            if found not in self._bare:
                self._reader.take(self._reader.at + len(found))
            if not found or found == self._reasoning.end:
                yield from self._end_thinking(found)
                return True
            fresh = yield from self._calls(found)
            if self._out.holding:
                self._out.thinking = False
                return fresh
            self._out.text()

    def _end_thinking(self, marker: str) -> Wait[None]:
        """Ends reasoning after its end marker, or if that is "" with the output."""
        if self._out.holding:
            self._out.to_reasoning(marker)
        if marker:
            yield from self._reader.optional("\n")
            yield from self._reader.optional("\n")
        self._out.markup()
        self._out.thinking = False
        self._out.structured = True
        self._in_answer = self._reasoning is not None and not self._reasoning.answer

    def _answer_marker(self, marker: str) -> Wait[bool]:
        """Drops a marker around an answer, already read; one that is out of place is text. Returns whether only
        whitespace came since."""
        assert self._reasoning is not None
        begins = marker == self._reasoning.answer
        may_begin = self._out.structured or self._reasoning.answers_alone
        expected = may_begin if begins else self._in_answer
        self._in_answer = begins and expected
        if not expected:
            self._out.text()
            return False
        if begins:
            yield from self._reader.optional("\n")
        self._out.structured = True
        self._out.markup()
        return not begins

    def _calls(self, begin: str) -> Wait[bool]:
        """Reads calls, their begin marker already read unless they are bare. Returns whether there was one and only
        whitespace since."""
        assert self._format is not None
        reader, out = self._reader, self._out
        self._call = None
        try:
            yield from self._payload(begin)
        except Malformed as error:
            if self._call is None:
                out.text()
                return False
            if not self._call.fail(error.missing):
                return False
        else:
            if not self._is_text():
                yield from reader.space()
                if (yield from reader.run(_EXTRA)):
                    following = yield from reader.space()
                    if following and not (yield from reader.ahead(self._format.end)):
                        out.text()
                        return False
        yield from reader.space()
        while (yield from reader.literal(self._format.after + self._format.end)):
            out.text() if self._is_text() else out.markup()
            yield from reader.space()
        if self._is_text():
            out.text()
            return False
        return True

    def _payload(self, begin: str) -> Wait[None]:
        assert self._format is not None
        reader, format = self._reader, self._format
        bare = begin in self._bare
        following = yield from reader.space()
        while not bare and (yield from reader.literal(format.before)):
            following = yield from reader.space()
        is_json = "json" in format.payloads and following in ("{", "[")
        if is_json and following == "[" and "pythonic" in format.payloads and not bare:
            is_json = bool((yield from reader.ahead(_JSON_LISTS)))
        self._bare_call, self._hold_call = bare, bare and is_json
        if is_json:
            yield from payloads.json_calls(reader, self, format, bare)
        elif "tags" in format.payloads:
            yield from payloads.tagged_calls(reader, self, format, begin)
        elif "pythonic" in format.payloads:
            yield from payloads.pythonic_calls(reader, self, bare)
        elif "named" in format.payloads:
            yield from payloads.named_call(reader, self, format)
        else:
            raise Malformed

    def _is_text(self) -> bool:
        return self._call is not None and self._call.is_text

    def open(self) -> CallWriter:
        """For readers of payloads and messages: the next call."""
        self._call = CallWriter(
            self._out,
            self._tools,
            self._new_id,
            bare=self._bare_call,
            hold=self._hold_call,
            as_text=self._unknown_as_text,
        )
        return self._call

    def text(self, _: str = "") -> None:
        """For payload readers: what was read since the last event is text."""
        self._out.text()

    def closed(self) -> None:
        """For payload readers: what was read since the last call closes a list of calls."""
        if self._call is not None and (self._call.is_text or self._call.malformed):
            self._out.text()
        else:
            self._out.markup()


_JSON_LISTS = ("[{", "[ {", "[\n{", "[\n  {", "[\n    {")  # the others are of Python
_EXTRA = re.compile(r"[}\]]+")  # closing brackets too many: small models write them
