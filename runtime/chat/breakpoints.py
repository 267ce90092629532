"""Finds a conversation's cache breakpoints in the prompt that its template renders."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from .conversation import Breakpoint, CallPart, ChatTurn, Part, TextPart
from .prompt import ChatPrompt

_MARK = "\ue000breakpoint\ue001"  # private-use characters, which ordinary text does not contain
_OTHER_TOOL = {
    "type": "function",
    "function": {"name": _MARK, "description": _MARK, "parameters": {"type": "object", "properties": {}}},
}


def breakpoint_positions(prompt: ChatPrompt, text: str, most: int) -> list[tuple[int, Breakpoint]]:
    """(position in characters of ``text``, breakpoint) for each tool, text and call that has one.

    ``text`` is the prompt's. A template may do anything with a part, so a breakpoint is found by rendering once more
    with something else behind it: what both have in common is the prefix. It ends with the part's text, a call's last
    argument, or where the next tool begins. Of more than ``most`` breakpoints the last count; tools come before turns.
    """
    found: list[tuple[int, Breakpoint]] = []
    for breakpoint, i, k in [*_of_tools(prompt), *_of_turns(prompt)][-most:]:
        if k is None:
            definitions = [tool.definition for tool in prompt.tools[: i + 1]]
            other = prompt.text(definitions=[*definitions, _OTHER_TOOL])
        else:
            other = prompt.text([*prompt.turns[:i], _marked_turn(prompt.turns[i], k), *prompt.turns[i + 1 :]])
        at = _common_prefix(text, other)
        if at:
            found.append((at, breakpoint))
    return found


def _of_tools(prompt: ChatPrompt) -> Iterator[tuple[Breakpoint, int, None]]:
    for i, tool in enumerate(prompt.tools):
        if tool.breakpoint is not None:
            yield tool.breakpoint, i, None


def _of_turns(prompt: ChatPrompt) -> Iterator[tuple[Breakpoint, int, int]]:
    for i, turn in enumerate(prompt.turns):
        for k, part in enumerate(turn.parts):
            if isinstance(part, (TextPart, CallPart)) and part.breakpoint is not None:
                yield part.breakpoint, i, k


def _marked_turn(turn: ChatTurn, k: int) -> ChatTurn:
    return msgspec.structs.replace(turn, parts=[*turn.parts[:k], _marked(turn.parts[k]), *turn.parts[k + 1 :]])


def _marked(part: Part) -> Part:
    """With more text, or one more argument."""
    if not isinstance(part, CallPart):
        return msgspec.structs.replace(part, text=part.text + _MARK)
    arguments = part.arguments
    if isinstance(arguments, dict):
        return msgspec.structs.replace(part, arguments={**arguments, _MARK: 0})
    begun = arguments.rstrip()
    if not begun.endswith("}"):
        return msgspec.structs.replace(part, arguments=arguments + _MARK)
    comma = "" if begun[:-1].rstrip().endswith("{") else ", "
    return msgspec.structs.replace(part, arguments=f'{begun[:-1]}{comma}"{_MARK}": 0}}')


def _common_prefix(text: str, other: str) -> int:
    """How many characters two texts have in common at their beginning; 0 if they are equal: nothing is marked then."""
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
