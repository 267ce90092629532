"""An output of a model, with what it must be read as; and the tools that the model has."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from branchwise.runtime.chat.tools.definitions import Tool
from branchwise.runtime.chat.tools.events import Event
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


A1 = '{"name": "f", "arguments": {"a": 1}}'
A1_CALL = ("f", '{"a": 1}', True)
NESTED = r'{"s": "}]{[\"</tool_call>\\", "o": {"l": [[], {"x": "\u00e9\ud83d\ude00 ü 🙂\n"}]}, "n": -1.50e+3}'
