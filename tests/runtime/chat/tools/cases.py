"""An output of a model, with what it must be read as; and the tools that the model has."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from branchwise.runtime.chat.tools.definitions import Tool
from branchwise.runtime.chat.tools.events import (
    ArgumentsDelta,
    CallEnd,
    CallStart,
    ContentDelta,
    Event,
    Markup,
    ReasoningDelta,
)
from branchwise.runtime.chat.tools.parser import StreamParser


def tool(name: str, **properties: Any) -> Tool:
    return Tool(name, {"type": "object", "properties": properties})


TOOLS = [
    tool("f", a={"type": "integer"}, s={"type": "string"}),
    tool("get-weather_2", city={"type": "string"}),
    tool(
        "all",
        s={"type": "string"},
        i={"type": "integer"},
        n={"type": "number"},
        b={"type": "boolean"},
        o={"type": "object"},
        l={"type": "array"},
        maybe={"anyOf": [{"type": "string"}, {"type": "null"}]},
        either={"type": ["integer", "string"]},
        level={"enum": [1, 2, 3]},
        ref={"$ref": "#/properties/i"},
        any={},
    ),
]


class Call(msgspec.Struct, frozen=True):
    """``arguments`` is JSON if ``complete`` and the model wrote valid JSON; otherwise what the model wrote of it."""

    id: str
    name: str
    arguments: str
    complete: bool
    source: str


class Parsed(msgspec.Struct, frozen=True):
    """A complete output. ``markup`` joins all `Markup`: its length and the others' add up to the output's."""

    content: str
    reasoning: str
    calls: tuple[Call, ...]
    markup: str


def assemble(events: Iterable[Event]) -> Parsed:
    """Folds all events of one output. The answer does not depend on how its text was cut into pieces."""
    content: list[str] = []
    reasoning: list[str] = []
    markup: list[str] = []
    starts: list[CallStart] = []
    arguments: list[list[str]] = []
    sources: list[list[str]] = []
    complete: list[bool] = []
    for event in events:
        match event:
            case ContentDelta(text=text):
                content.append(text)
            case ReasoningDelta(text=text):
                reasoning.append(text)
            case Markup(source=source):
                markup.append(source)
            case CallStart(source=source):
                starts.append(event)
                arguments.append([])
                sources.append([source])
                complete.append(False)
            case ArgumentsDelta(index=index, text=text, source=source):
                arguments[index].append(text)
                sources[index].append(source)
            case CallEnd(index=index, source=source):
                complete[index] = event.complete
                sources[index].append(source)
    calls = tuple(
        Call(start.id, start.name, "".join(arguments[i]), complete[i], "".join(sources[i]))
        for i, start in enumerate(starts)
    )
    return Parsed("".join(content), "".join(reasoning), calls, "".join(markup))


def parse(text: str, *formats: Any, **options: Any) -> Parsed:
    """A whole output at once."""
    parser = StreamParser(*formats, **options)
    return assemble([*parser.feed(text), *parser.finish()])


@dataclass(frozen=True)
class Case:
    """``calls``: (name, arguments, complete)."""

    name: str
    text: str
    tools: str | None = "hermes"
    content: str = ""
    reasoning: str = ""
    calls: Sequence[tuple[str, str, bool]] = ()
    thoughts: str | None = "think"
    options: dict[str, Any] = field(default_factory=dict)

    def parser(self) -> StreamParser:
        ids = itertools.count()
        known = {"tools": TOOLS, "new_id": lambda: f"id{next(ids)}"} | self.options
        return StreamParser(self.tools, self.thoughts, **known)

    def stream(self, pieces: Sequence[str]) -> list[Event]:
        parser = self.parser()
        return [event for piece in pieces for event in parser.feed(piece)] + parser.finish()

    def read(self) -> Parsed:
        return assemble(self.stream([self.text]))


A1 = '{"name": "f", "arguments": {"a": 1}}'
A1_CALL = ("f", '{"a": 1}', True)
NESTED = r'{"s": "}]{[\"</tool_call>\\", "o": {"l": [[], {"x": "\u00e9\ud83d\ude00 ü 🙂\n"}]}, "n": -1.50e+3}'
