"""Tool calls on an OpenAI-compatible server, which parses and writes them itself.

A state is text, so a call that the server has parsed becomes text in the Hermes form, and an object again when the
conversation is sent.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...runtime.chat.blocks import Block, read_blocks, text_of
from ...runtime.chat.tools.parser import StreamParser
from .backend import Turn


def written(content: str, calls: Iterable[Mapping[str, Any]]) -> str:
    """An answer and its tool calls as one text."""
    pieces = [content] if content else []
    for one in calls:
        function = one.get("function") or {}
        name, arguments = json.dumps(function.get("name") or ""), function.get("arguments") or "{}"
        pieces.append(f'<tool_call>\n{{"name": {name}, "arguments": {arguments}}}\n</tool_call>')
    return "\n".join(pieces)


def conversation(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """The turns as OpenAI messages, with tool calls as objects. Results come in the order of the calls and take their
    ids."""
    found: list[dict[str, Any]] = []
    open_ids: deque[str] = deque()
    made = 0
    for one in turns:
        message: dict[str, Any] = {"role": one.role, "content": one.content}
        blocks = _blocks(one.content) if one.role == "assistant" else []
        if calls := [block for block in blocks if block.kind == "call"]:
            open_ids.clear()
            message |= {"content": text_of(blocks, "text").strip() or None, "tool_calls": []}
            for call in calls:
                id, made = f"call{made:05}", made + 1  # nine alphanumerics: Mistral's templates take no other
                function = {"name": call.name, "arguments": call.text}
                message["tool_calls"].append({"id": id, "type": "function", "function": function})
                open_ids.append(id)
        elif one.role == "tool" and open_ids:
            message["tool_call_id"] = open_ids.popleft()
        found.append(message)
    return found


def _blocks(content: str) -> list[Block]:
    return read_blocks(StreamParser("hermes", unknown_tools="call"), content)
