"""From typed turns to the dicts that a chat template reads."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

import msgspec

from ..errors import InvalidRequest
from ..limits import MAX_DEPTH
from .conversation import Call, Turn
from .json_bounds import deeper_than_now
from .template import ChatTemplate

_BETWEEN_TURNS = "\n\n"  # between merged system turns


def template_messages(
    turns: Sequence[Turn], template: ChatTemplate, *, continue_final: bool = False
) -> list[dict[str, Any]]:
    """``turns`` as ``template`` reads them: only fields that templates know, no nulls.

    ``developer`` becomes ``system`` for a template that does not know the role. Neighbouring system turns become one
    message: many templates accept only one. Several text parts stay a list where the template writes lists of parts
    itself, so they join as it joins them; elsewhere they become one string, as does the last turn if it is continued.
    Raises `InvalidRequest` naming the client's field.
    """
    result = []
    for role, group in itertools.groupby(turns, key=lambda turn: _role(turn, template)):
        if role == "system":
            result.append(_message(role, list(group), template, as_text=False))
        else:
            for turn in group:
                result.append(_message(role, [turn], template, as_text=continue_final and turn is turns[-1]))
    return result


def _role(turn: Turn, template: ChatTemplate) -> str:
    return "system" if turn.role == "developer" and not template.knows_developer else turn.role


def _message(role: str, turns: list[Turn], template: ChatTemplate, *, as_text: bool) -> dict[str, Any]:
    first = turns[0]
    content: str | list[dict[str, str]]
    if len(turns) == 1 and len(first.texts) > 1 and not as_text and template.reads_parts(role):
        content = [{"type": "text", "text": text} for text in first.texts]
    else:
        separator = template.part_separator(role) if any(len(turn.texts) > 1 for turn in turns) else ""
        content = _BETWEEN_TURNS.join(separator.join(turn.texts) for turn in turns)
    message: dict[str, Any] = {"role": role, "content": content}
    if first.name is not None:
        message["name"] = first.name
    if first.call_id is not None:
        message["tool_call_id"] = first.call_id
    if thinking := first.thinking:
        message["reasoning_content"] = thinking
    if calls := first.calls:  # templates ask whether the key is there
        message["tool_calls"] = [_call(call, template) for call in calls]
    return message


def _call(call: Call, template: ChatTemplate) -> dict[str, Any]:
    function = {"name": call.name, "arguments": _arguments(call, template)}
    id = {} if call.id is None else {"id": call.id}
    return {"type": "function", "function": function, **id}


def _arguments(call: Call, template: ChatTemplate) -> str | dict[str, Any]:
    """Text where the template writes it verbatim: the prompt then has the very tokens that the model generated."""
    if template.keeps_arguments:
        return call.arguments if isinstance(call.arguments, str) else json.dumps(call.arguments, ensure_ascii=False)
    if isinstance(call.arguments, dict):
        return call.arguments
    path = f"{call.path}.arguments"
    if deeper_than_now(call.arguments.encode("utf-8", "surrogatepass"), MAX_DEPTH):
        raise InvalidRequest(path, f"must be nested at most {MAX_DEPTH} deep")
    try:
        value = msgspec.json.decode(call.arguments)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
        raise InvalidRequest(path, "must be valid JSON: this model's chat template writes it anew") from error
    if not isinstance(value, dict):
        raise InvalidRequest(path, f"must be a JSON object, got {type(value).__name__}")
    return value
