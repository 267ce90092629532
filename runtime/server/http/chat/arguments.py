"""Bounds on the arguments of a conversation's calls: JSON text inside strings, which no other check parses."""

from __future__ import annotations

from collections.abc import Sequence

from ....chat.conversation import ChatTurn
from ....chat.json_bounds import count_values, deeper_than
from ....chat.template import ChatTemplate
from ....errors import InvalidRequest
from ....limits import MAX_DEPTH


async def bound_arguments(turns: Sequence[ChatTurn], template: ChatTemplate, most: int) -> None:
    """Refuses arguments that would be slow to decode: more than ``most`` values together, or deep nesting."""
    if template.probes.keeps_arguments:
        return
    calls = [(call.path, call.arguments) for turn in turns for call in turn.calls]
    texts = [(path, arguments) for path, arguments in calls if isinstance(arguments, str)]
    for path, text in texts:
        if text.count("[") + text.count("{") > MAX_DEPTH and await deeper_than(_bytes(text), MAX_DEPTH):
            raise InvalidRequest(f"{path}.arguments", f"must be nested at most {MAX_DEPTH} deep")
    if sum(text.count(mark) for _, text in texts for mark in ",:[[{{") <= most:
        return
    values = 0
    for _, text in texts:
        values += (await count_values(_bytes(text), 0)).all
        if values > most:
            raise InvalidRequest("messages", f"must have at most {most} names and values in the arguments of calls")


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
