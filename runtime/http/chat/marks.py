"""Where a conversation's cache breakpoints are in the text its template makes of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from ..cache_fields import MAX_BREAKPOINTS, part_ttl

_MARK = "\ue000breakpoint\ue001"  # private-use characters: no text that means anything has them


async def chat_marks(
    messages: Sequence[Any], text: str, render: Callable[[list[Any]], Awaitable[str]]
) -> list[tuple[int, str | float | None]]:
    """(position in characters of ``text``, ttl) for each part with ``prompt_cache_breakpoint`` or ``cache_control``.

    ``text`` is what ``render`` makes of ``messages``. A template may do anything with a part, so its end is found by
    rendering the conversation once more with a mark there: what comes before the mark and is the same is the prefix.
    Of more than four breakpoints the last four count.
    """
    found: list[tuple[int, int, str | float | None]] = []
    for i, message in enumerate(messages):
        content = message.get("content") if isinstance(message, dict) else None
        for k, part in enumerate(content if isinstance(content, list) else ()):
            asked = part_ttl(part, f"messages[{i}].content[{k}]") if isinstance(part, dict) else None
            if asked is not None:
                found.append((i, k, asked[0]))
    marks: list[tuple[int, str | float | None]] = []
    for i, k, ttl in found[-MAX_BREAKPOINTS:]:
        part = messages[i]["content"][k]
        name = "refusal" if part.get("type") == "refusal" else "text"
        content = [*messages[i]["content"]]
        content[k] = {**part, name: f"{part[name]}{_MARK}"}
        marked = await render([*messages[:i], {**messages[i], "content": content}, *messages[i + 1 :]])
        at = marked.find(_MARK)
        if at < 0 or marked[:at] != text[:at]:
            at = next((p for p, (a, b) in enumerate(zip(marked, text, strict=False)) if a != b), 0)
        if at:
            marks.append((at, ttl))
    return marks
