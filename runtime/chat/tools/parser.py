"""Splits a model's output into content, reasoning and tool calls, as it arrives.

What counts as what:

- A call starts as soon as its name is known. Text that looked like a call and departs from the format before that is
  content, whole and with its markers; reading goes on right behind it.
- A call that started stays one. Where its arguments leave the format or the output ends, they end, `CallEnd` says it
  is not complete, and nothing is made up: no closing brace, no missing value. What follows is content.
- A call without arguments, or whose arguments are ``null``, has ``{}``.
- A call of a tool that is not there is content, whole, or a call like others (``unknown_tools``).
- Whitespace around and between calls, where nothing else is written, belongs to them. Any other stays in the content.
- Reasoning begins where only whitespace came before it (in the message, or since the last reasoning or call); a
  marker elsewhere is text. Inside reasoning, markers of calls are text unless ``tools_in_reasoning``. Unclosed
  reasoning lasts to the end.

`events` has the rule that accounts for every character.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from . import payloads
from .definitions import Tool
from .events import Event, Parsed, assemble
from .formats import ReasoningFormat, ToolFormat, reasoning_format, tool_format
from .output import CallWriter, Output, long_id, short_id
from .reader import Malformed, Markers, Reader, Wait

_BARE = "a call without a marker"


class StreamParser:
    """One output: `feed` its pieces, then `finish`.

    ``tools``: the tools the model was given; None takes any name for a tool's. ``reasoning_open``: the prompt ended
    inside reasoning (`detect.ends_in_reasoning`). ``unknown_tools``: what a call of another tool is.
    ``tools_in_reasoning``: calls are looked for in reasoning too, which goes on after them. ``new_id`` makes call ids.

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
        tools_in_reasoning: bool = False,
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
        thoughts = (self._reasoning.begin,) if self._reasoning else ()
        self._begins = Markers(begins)
        self._openings = Markers(thoughts + begins)
        self._thought_ends = Markers(
            ((self._reasoning.end,) if self._reasoning else ()) + (begins if tools_in_reasoning else ())
        )
        self._bare_starts = ""
        if self._format and self._format.bare:
            self._bare_starts = "[" if "pythonic" in self._format.payloads else "{"
        self._reader = Reader()
        self._out = Output(self._reader)
        self._call: CallWriter | None = None
        self._reading = self._read(reasoning_open)
        self._finished = False
        next(self._reading, None)

    @property
    def in_reasoning(self) -> bool:
        """Whether the text so far ends inside reasoning: what constrains calls must wait."""
        return self._out.thinking

    def feed(self, text: str) -> list[Event]:
        """What ``text`` adds. Raises ValueError after `finish`."""
        if self._finished:
            raise ValueError("fed after finish")
        if not text:
            return []
        self._reader.push(text)
        next(self._reading)
        return self._out.events()

    def finish(self) -> list[Event]:
        """No more text will come: what was held back. Nothing if called again."""
        if not self._finished:
            self._finished = True
            self._reader.ended = True
            for _ in self._reading:
                raise AssertionError("a reader waits for text after the end")
        return self._out.events()

    def _read(self, reasoning_open: bool) -> Wait[None]:
        if reasoning_open:
            yield from self._think(opened=True)
        fresh = True  # only whitespace since the start, the last reasoning or the last call
        while True:
            if fresh:
                found = yield from self._opening()
            else:
                found = yield from self._reader.until(self._begins, self._out.text)
                self._reader.take(self._reader.at + len(found))
            if not found:
                if not (yield from self._reader.peek()):
                    break
                fresh = False
            elif self._reasoning and found == self._reasoning.begin:
                yield from self._think(opened=False)
                fresh = True
            else:
                fresh = yield from self._calls(found)
        if fresh and self._out.structured:
            self._out.markup()
        else:
            self._out.text()

    def _opening(self) -> Wait[str]:
        """Where reasoning or calls may begin: the marker, read; `_BARE`; "" if text or the end is there."""
        following = yield from self._reader.space()
        found = yield from self._reader.literal(self._openings.all)
        if found:
            return found
        if following and following in self._bare_starts:
            return _BARE
        if following:
            self._out.text()
        return ""

    def _think(self, *, opened: bool) -> Wait[None]:
        """Reads reasoning to its end, its begin marker already read unless ``opened`` by the prompt."""
        assert self._reasoning is not None
        self._out.structured = self._out.thinking = True
        if opened:
            yield from self._reader.literal((self._reasoning.begin,))  # some models repeat it
        yield from self._reader.optional("\n")
        self._out.markup()
        while True:
            found = yield from self._reader.until(self._thought_ends, self._out.text, drop_newline=True)
            if not found:
                break
            self._reader.take(self._reader.at + len(found))
            if found == self._reasoning.end:
                yield from self._reader.optional("\n")
                yield from self._reader.optional("\n")
                break
            yield from self._calls(found)
            self._out.text()  # whitespace after a call is thinking again
        self._out.markup()
        self._out.thinking = False

    def _calls(self, begin: str) -> Wait[bool]:
        """Reads calls, their begin marker already read. Whether there was one and nothing but whitespace since."""
        assert self._format is not None
        bare = begin == _BARE
        self._call = None
        try:
            yield from self._payload(begin, bare)
        except Malformed:
            call = self._call
            if call is None or call.over or not call.started:
                self._out.text()
                return False
            call.abandon()
        yield from self._reader.space()
        if (yield from self._reader.literal(self._format.end)):
            self.closed()
        return not self._is_text()

    def _payload(self, begin: str, bare: bool) -> Wait[None]:
        assert self._format is not None
        kinds = self._format.payloads
        if "xml" in kinds:
            yield from payloads.xml_calls(self._reader, self, self._format, begin)
        elif "pythonic" in kinds:
            yield from payloads.pythonic_calls(self._reader, self, bare)
        else:
            following = yield from self._reader.space()
            if "named" in kinds and following not in ("{", "["):
                yield from payloads.named_call(self._reader, self)
            else:
                yield from payloads.json_calls(self._reader, self, self._format, bare)

    def _is_text(self) -> bool:
        return self._call is not None and self._call.is_text

    def open(self, bare: bool = False) -> CallWriter:
        """For payload readers: the next call."""
        self._call = CallWriter(self._out, self._tools, self._new_id, bare, self._unknown_as_text)
        return self._call

    def closed(self) -> None:
        """For payload readers: what was read since the last call closes it, or a list of calls."""
        if self._is_text():
            self._out.text()
        else:
            self._out.markup()


def parse(
    text: str,
    tools_format: ToolFormat | str | None,
    reasoning: ReasoningFormat | str | None = None,
    tools: Sequence[Tool] | None = None,
    *,
    reasoning_open: bool = False,
    unknown_tools: Literal["content", "call"] = "content",
    tools_in_reasoning: bool = False,
    new_id: Callable[[], str] | None = None,
) -> Parsed:
    """A whole output at once: the fold of one `StreamParser.feed` and `finish`."""
    parser = StreamParser(
        tools_format,
        reasoning,
        tools,
        reasoning_open=reasoning_open,
        unknown_tools=unknown_tools,
        tools_in_reasoning=tools_in_reasoning,
        new_id=new_id,
    )
    return assemble([*parser.feed(text), *parser.finish()])
