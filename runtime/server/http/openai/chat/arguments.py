"""The arguments of calls in a conversation come as text: JSON that nobody has counted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .....chat.json_bounds import count_values, deeper_than
from .....chat.template import ChatTemplate
from .....limits import MAX_DEPTH
from ...plumbing.errors import bad


async def bound_arguments(messages: Sequence[Any], template: ChatTemplate, most: int) -> None:
    """Refuses what `conversation` would take long to make values of: more than ``most`` of them, or deep nests."""
    if template.keeps_arguments:
        return
    texts = {where: text for i, message in enumerate(messages) for where, text in _arguments(message, f"messages[{i}]")}
    for where, text in texts.items():
        if text.count("[") + text.count("{") > MAX_DEPTH and await deeper_than(_bytes(text), MAX_DEPTH):
            raise bad(where, f"must be nested at most {MAX_DEPTH} deep")
    if sum(text.count(mark) for text in texts.values() for mark in ",:[[{{") <= most:
        return
    values = 0
    for text in texts.values():
        values += (await count_values(_bytes(text), 0)).all
        if values > most:
            raise bad("messages", f"must have at most {most} names and values in the arguments of calls")


def _arguments(message: Any, where: str) -> Iterator[tuple[str, str]]:
    """The texts among them, and where they are."""
    calls = message.get("tool_calls") if isinstance(message, dict) else None
    for i, call in enumerate(calls if isinstance(calls, list) else ()):
        function = call.get("function") if isinstance(call, dict) else None
        arguments = function.get("arguments") if isinstance(function, dict) else None
        if isinstance(arguments, str):
            yield f"{where}.tool_calls[{i}].function.arguments", arguments


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
