"""Where a conversation's cache breakpoints are in the text its template makes of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

from ...fields.cache import MAX_BREAKPOINTS, part_ttl

_MARK = "\ue000breakpoint\ue001"  # private-use characters: no text that means anything has them
_OTHER_TOOL = {
    "type": "function",
    "function": {"name": _MARK, "description": _MARK, "parameters": {"type": "object", "properties": {}}},
}

Definitions = list[dict[str, Any]] | None  # of the tools, as a template gets them
_Place = tuple[str | float | None, str, int, int]  # ttl; tools[i], or messages[i]'s content[k] or tool_calls[k]


async def chat_marks(
    messages: Sequence[Any],
    tools: Sequence[Any] | None,
    definitions: Definitions,
    text: str,
    render: Callable[[list[Any], Definitions], Awaitable[str]],
) -> list[tuple[int, str | float | None]]:
    """(position in characters of ``text``, ttl) for each tool, content part and call with ``prompt_cache_breakpoint``
    or ``cache_control``.

    ``text`` is what ``render`` makes of the messages and ``definitions``, those of ``tools``. A template may do
    anything with them, so a breakpoint is found by rendering once more with something else behind it: what is the same
    is the prefix. It ends with the part's text, a call's last argument, or where the next tool begins. Of more than
    four breakpoints the last four count: tools come before messages.
    """
    found = [*_of_tools(tools if definitions else ()), *_of_messages(messages)]
    marks: list[tuple[int, str | float | None]] = []
    for ttl, field, i, k in found[-MAX_BREAKPOINTS:]:
        if field == "tools":
            other = await render(list(messages), [*(definitions or ())[: i + 1], _OTHER_TOOL])
        else:
            entries = [*messages[i][field]]
            entries[k] = _marked_part(entries[k]) if field == "content" else _marked_call(entries[k])
            other = await render([*messages[:i], {**messages[i], field: entries}, *messages[i + 1 :]], definitions)
        at = _same(text, other)
        if at:
            marks.append((at, ttl))
    return marks


def _of_tools(tools: Sequence[Any] | None) -> Iterator[_Place]:
    for i, tool in enumerate(tools or ()):
        asked = part_ttl(tool, f"tools[{i}]")
        if asked is not None:
            yield asked[0], "tools", i, 0


def _of_messages(messages: Sequence[Any]) -> Iterator[_Place]:
    for i, message in enumerate(messages):
        for field in ("content", "tool_calls"):
            entries = message.get(field) if isinstance(message, dict) else None
            for k, entry in enumerate(entries if isinstance(entries, list) else ()):
                asked = part_ttl(entry, f"messages[{i}].{field}[{k}]") if isinstance(entry, dict) else None
                if asked is not None:
                    yield asked[0], field, i, k


def _marked_part(part: dict[str, Any]) -> dict[str, Any]:
    name = "refusal" if part.get("type") == "refusal" else "text"
    return {**part, name: f"{part[name]}{_MARK}"}


def _marked_call(call: dict[str, Any]) -> dict[str, Any]:
    """With one more argument."""
    arguments = call["function"].get("arguments") or "{}"
    if isinstance(arguments, dict):
        more: Any = {**arguments, _MARK: 0}
    elif arguments.rstrip().endswith("}"):
        before = arguments.rstrip()[:-1]
        comma = "" if before.rstrip().endswith("{") else ", "
        more = f'{before}{comma}"{_MARK}": 0}}'
    else:
        more = f"{arguments}{_MARK}"
    return {**call, "function": {**call["function"], "arguments": more}}


def _same(text: str, other: str) -> int:
    """How many characters they have in common at their beginning; 0 where nothing differs, for nothing is marked."""
    if text == other:
        return 0
    same, most = 0, min(len(text), len(other))
    while same < most:
        middle = (same + most + 1) // 2
        if text[same:middle] == other[same:middle]:
            same = middle
        else:
            most = middle - 1
    return same
