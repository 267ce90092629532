"""Calls of tools on an OpenAI-compatible server, which parses and writes them itself.

A state is text. So a call that the server has parsed becomes text there, in the form of Hermes models, and an object
again when the conversation is sent.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...runtime.chat.tools import parse
from .backend import Message


def written(content: str, calls: Iterable[Mapping[str, Any]]) -> str:
    """An answer and its calls as one text."""
    pieces = [content] if content else []
    for one in calls:
        function = one.get("function") or {}
        name, arguments = json.dumps(function.get("name") or ""), function.get("arguments") or "{}"
        pieces.append(f'<tool_call>\n{{"name": {name}, "arguments": {arguments}}}\n</tool_call>')
    return "\n".join(pieces)


def conversation(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages with their calls as objects; the answer to a call, which comes in their order, repeats its id."""
    found: list[dict[str, Any]] = []
    open_ids: deque[str] = deque()
    made = 0
    for one in messages:
        message: dict[str, Any] = {"role": one.role, "content": one.content}
        if one.role == "assistant" and (parsed := parse(one.content, "hermes", unknown_tools="call")).calls:
            open_ids.clear()
            message |= {"content": parsed.content.strip() or None, "tool_calls": []}
            for call in parsed.calls:
                id, made = f"call{made:05}", made + 1  # nine alphanumerics: Mistral's templates take no other
                function = {"name": call.name, "arguments": call.arguments}
                message["tool_calls"].append({"id": id, "type": "function", "function": function})
                open_ids.append(id)
        elif one.role == "tool" and open_ids:
            message["tool_call_id"] = open_ids.popleft()
        found.append(message)
    return found
