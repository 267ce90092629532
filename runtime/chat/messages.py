"""From typed turns to the dicts that a chat template reads."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from ..errors import InvalidRequest
from ..limits import MAX_DEPTH
from .conversation import CallPart, ChatTurn
from .json_bounds import deeper_than_now
from .probes import TemplateProbes
from .template import ChatTemplate

_BETWEEN_TURNS = "\n\n"  # of turns that become one message


def template_messages(
    turns: Sequence[ChatTurn], template: ChatTemplate, *, continue_final: bool = False
) -> list[dict[str, Any]]:
    """``turns`` as ``template`` reads them: only fields that templates read, no nulls.

    Roles: ``developer`` becomes ``system`` for a template without that role, and a system turn after the first
    user's becomes ``user`` for one that accepts no such turn. Neighbouring system turns are one message, and so are
    neighbouring turns of another role where the template refuses two in a row. Text parts stay a list where the
    template reads lists of parts, so they join as it joins them; elsewhere they become one string, as does the last
    turn if it is continued. Where the template writes one call of a turn, each call is a turn, with its results behind
    it. Raises `InvalidRequest` naming the client's field.
    """
    probes, messages, last = template.probes, [], turns[-1] if continue_final else None
    if any(len(turn.calls) > 1 for turn in turns) and not probes.writes_all_calls:
        turns = list(_one_call_each(turns, last))
    for role, group in itertools.groupby(_with_roles(turns, probes), key=lambda entry: entry[0]):
        alike = [turn for _, turn in group]
        if role == "system" or (role in _REPEATED and len(alike) > 1 and not probes.accepts(*_REPEATED[role])):
            messages.append(_message(role, alike, template, last))
        else:
            messages += [_message(role, [turn], template, last) for turn in alike]
    return messages


_REPEATED = {"user": ("user", "user"), "assistant": ("user", "assistant", "assistant", "user")}


def _one_call_each(turns: Sequence[ChatTurn], continued: ChatTurn | None) -> Iterator[ChatTurn]:
    """``turns`` with at most one call in each, followed by its results; those that name no call of the turn stay behind
    the last one."""
    at = 0
    while at < len(turns):
        turn, at = turns[at], at + 1
        if len(turn.calls) < 2 or turn is continued:
            yield turn
            continue
        results = list(itertools.takewhile(lambda result: result.role == "tool", turns[at:]))
        at += len(results)
        parts = [part for part in turn.parts if not isinstance(part, CallPart)]
        for call in turn.calls:
            yield msgspec.structs.replace(turn, parts=[*parts, call])
            parts = []
            if call is turn.calls[-1]:
                yield from results
            else:
                yield from (result for result in results if result.call_id == call.id)
                results = [result for result in results if result.call_id != call.id]


def _with_roles(turns: Sequence[ChatTurn], probes: TemplateProbes) -> Iterator[tuple[str, ChatTurn]]:
    leading = True  # only system turns so far
    for turn in turns:
        role: str = "system" if turn.role == "developer" and not probes.knows_developer else turn.role
        leading = leading and role in ("system", "developer")
        if role == "system" and not leading and not probes.accepts_late_system:
            role = "user"
        yield role, turn


def _message(role: str, turns: list[ChatTurn], template: ChatTemplate, continued: ChatTurn | None) -> dict[str, Any]:
    first = turns[0]
    content: str | list[dict[str, str]]
    thinking = "\n".join(turn.thinking for turn in turns if turn.thinking)
    calls = [call for turn in turns for call in turn.calls]
    both = thinking and calls and any(turn.texts for turn in turns)
    merged = both and not template.probes.takes_thinking_beside_text
    parts = len(turns) == 1 and len(first.texts) > 1 and first is not continued and not merged
    if parts and template.probes.reads_parts(role):
        content = [{"type": "text", "text": text} for text in first.texts]
    else:
        separator = template.probes.part_separator(role) if any(len(turn.texts) > 1 for turn in turns) else ""
        content = _BETWEEN_TURNS.join(separator.join(turn.texts) for turn in turns if turn.texts)
        if merged and content:
            thinking, content = f"{thinking}{_BETWEEN_TURNS}{content}", ""
    message: dict[str, Any] = {"role": role, "content": content}
    if first.name is not None:
        message["name"] = first.name
    if first.call_id is not None:
        message["tool_call_id"] = first.call_id
    if thinking:
        message["reasoning_content"] = thinking
    if calls:  # templates ask whether the key is there
        message["tool_calls"] = [_call(call, template) for call in calls]
    return message


def _call(call: CallPart, template: ChatTemplate) -> dict[str, Any]:
    function = {"name": call.name, "arguments": _arguments(call, template)}
    id = {} if call.id is None else {"id": call.id}
    return {"type": "function", "function": function, **id}


def _arguments(call: CallPart, template: ChatTemplate) -> str | dict[str, Any]:
    """Text where the template writes it verbatim: the prompt then has the very tokens that the model generated."""
    if template.probes.keeps_arguments:
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
