"""Tool calls in the Hermes / Qwen convention: tools of invented and everyday names, results fed back, a final answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from .conversation import Conversation, assistant, user
from .dialogue import SYSTEMS, small_talk
from .draw import Draw
from .world import COLOURS, DAYS, FIRST_NAMES

_VERBS = [
    "get",
    "find",
    "book",
    "send",
    "open",
    "close",
    "start",
    "stop",
    "check",
    "list",
    "create",
    "delete",
    "update",
    "search",
    "order",
    "move",
    "play",
    "print",
    "lock",
    "share",
    "count",
    "paint",
    "clean",
    "move",
    "load",
    "save",
    "track",
    "rent",
    "fix",
]
_NOUNS = [
    "weather",
    "room",
    "table",
    "ticket",
    "email",
    "door",
    "window",
    "timer",
    "alarm",
    "song",
    "file",
    "order",
    "train",
    "flight",
    "taxi",
    "price",
    "stock",
    "note",
    "task",
    "event",
    "photo",
    "report",
    "garden",
    "boat",
    "lamp",
    "cake",
    "parcel",
    "map",
    "light",
    "heater",
    "camera",
    "door",
    "battery",
    "printer",
    "kettle",
]
_STRINGS = [
    "city",
    "name",
    "title",
    "date",
    "day",
    "person",
    "place",
    "colour",
    "topic",
    "street",
    "message",
    "label",
    "country",
    "owner",
    "artist",
    "genre",
    "language",
    "currency",
    "user",
    "folder",
    "brand",
    "reason",
]
_INTEGERS = [
    "count",
    "number",
    "size",
    "limit",
    "amount",
    "hours",
    "minutes",
    "seats",
    "nights",
    "floor",
    "level",
    "page",
    "weight",
    "price",
    "year",
    "volume",
    "speed",
]
_BOOLEANS = ["urgent", "quiet", "public", "repeat", "fast", "shared", "private"]
_RESULTS = [
    "status",
    "temperature",
    "price",
    "total",
    "id",
    "time",
    "distance",
    "score",
    "result",
    "owner",
    "place",
    "seats",
    "level",
    "code",
    "message",
    "duration",
]
_TYPES = {"string": "string", "integer": "integer", "boolean": "boolean"}


def make(draw: Draw) -> Conversation:
    tools, target = _toolbox(draw)
    messages: list[dict[str, Any]] = []
    if draw.chance(0.5):
        messages.append({"role": "system", "content": draw.pick(SYSTEMS)})
    if draw.chance(0.15):
        messages += small_talk(draw)
        if not draw.held_out and draw.chance(0.5):
            return Conversation("tools_none", messages, [_wrapped(tool) for tool in tools])
    arguments = _arguments(draw, target)
    messages += [user(_request(draw, target, arguments)), _call(target, arguments)]
    family = "tools_call"
    rounds = 0
    while (draw.chance(0.7) and rounds < 2) or (draw.held_out and rounds == 0 and draw.chance(0.5)):
        if rounds:
            target = draw.pick(tools)
            arguments = _arguments(draw, target)
            messages += [user(_request(draw, target, arguments)), _call(target, arguments)]
        result, answer, expect = _result(draw)
        messages += [{"role": "tool", "content": json.dumps(result)}, assistant(answer)]
        family, rounds = "tools_answer", rounds + 1
        if draw.held_out:
            return Conversation(family, messages, [_wrapped(tool) for tool in tools], expect=expect)
    return Conversation(family, messages, [_wrapped(tool) for tool in tools])


def _wrapped(tool: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {k: v for k, v in tool.items() if k != "says"}}


def _call(tool: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": tool["name"], "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _toolbox(draw: Draw) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    count = draw.between(1, 2 + int(3 * draw.level * draw.random() + 0.5))
    tools: dict[str, dict[str, Any]] = {}
    while len(tools) < count:
        tool = _tool(draw)
        if tool is not None:
            tools[tool["says"]] = tool
    unique = list({tool["name"]: tool for tool in tools.values()}.values())
    return unique, draw.pick(unique)


def _tool(draw: Draw) -> dict[str, Any] | None:
    verb, noun = draw.pick(_VERBS), draw.pick(_NOUNS)
    r = draw.random()
    if r < 0.55:
        name, says = f"{verb}_{noun}", f"{verb} the {noun}"
    elif r < 0.8:
        noun = draw.word()
        name, says = f"{verb}_{noun}", f"{verb} the {noun}"
    else:
        name = draw.word()
        says = f"{verb} the {noun}"
        if draw.chance(0.5):
            says = f"use {name}"
    if not draw.mine(name):
        return None
    properties: dict[str, Any] = {}
    required = []
    for _ in range(draw.between(1, 2 + draw.between(0, 2))):
        r = draw.random()
        kind = "string" if r < 0.6 else "integer" if r < 0.9 else "boolean"
        key = draw.pick({"string": _STRINGS, "integer": _INTEGERS, "boolean": _BOOLEANS}[kind])
        if draw.chance(0.25):
            key = draw.word()
        if key in properties:
            continue
        properties[key] = {"type": kind}
        if draw.chance(0.4):
            properties[key]["description"] = draw.pick([f"The {key}", f"{key.capitalize()} to use", f"Which {key}"])
        if kind == "string" and draw.chance(0.1):
            properties[key]["enum"] = draw.words(draw.between(2, 3))
        if draw.chance(0.8):
            required.append(key)
    parameters = {"type": "object", "properties": properties, "required": required}
    description = f"{says.capitalize()}."
    return {"name": name, "description": description, "parameters": parameters, "says": says}


def _arguments(draw: Draw, tool: dict[str, Any]) -> dict[str, Any]:
    parameters = tool["parameters"]
    makers: dict[str, Callable[[], Any]] = {
        "integer": lambda: draw.between(1, 9 if draw.chance(0.4) else 999),
        "boolean": lambda: draw.chance(0.5),
    }
    chosen: dict[str, Any] = {}
    for key, schema in parameters["properties"].items():
        if key not in parameters["required"] and draw.chance(0.6):
            continue
        if "enum" in schema:
            chosen[key] = draw.pick(schema["enum"])
        elif schema["type"] == "string":
            chosen[key] = _string(draw, key)
        else:
            chosen[key] = makers[schema["type"]]()
    return chosen


def _string(draw: Draw, key: str) -> str:
    r = draw.random()
    if not draw.held_out:
        if key == "colour" and r < 0.5:
            return draw.pick(COLOURS)
        if key in ("day", "date") and r < 0.5:
            return draw.pick(DAYS)
        if r < 0.12:
            return draw.pick(FIRST_NAMES)
    if r < 0.5:
        return draw.name()
    if r < 0.75:
        return draw.word()
    if r < 0.88:
        return " ".join(draw.words(2))
    return draw.code()


def _request(draw: Draw, tool: dict[str, Any], arguments: dict[str, Any]) -> str:
    says = tool["says"] if draw.chance(0.85) else f"call {tool['name']}"
    items = [(k, str(v).lower() if isinstance(v, bool) else str(v)) for k, v in arguments.items()]
    items = draw.shuffled(items) if draw.chance(0.5) else items
    opening = draw.pick(
        ["Please {}", "Can you {}", "{}", "I want you to {}", "I need you to {}", "Could you {}"]
    ).format(says)
    opening = opening[0].upper() + opening[1:]
    if not items:
        return opening + draw.pick([".", " please.", ""])
    r = draw.random()
    if r < 0.3:
        rest = " with " + _joined([f"{k} {v}" for k, v in items]) + "."
    elif r < 0.5:
        rest = ": " + ", ".join(f"{k} = {v}" for k, v in items)
    elif r < 0.65:
        rest = ", " + ", ".join(f"{k}: {v}" for k, v in items)
    elif r < 0.85:
        rest = ". " + " ".join(f"The {k} is {v}." for k, v in items)
    else:
        rest = " where " + _joined([f"{k} is {v}" for k, v in items]) + "."
    return opening + rest


def _joined(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _result(draw: Draw) -> tuple[dict[str, Any], str, list[str]]:
    """What the tool says, and the answer that passes it on: every field, in order."""
    if draw.chance(0.12):
        reason = draw.pick(
            ["not found", "no access", "timed out", "service is busy", f"unknown {draw.pick(_STRINGS)} {draw.word()}"]
        )
        return {"error": reason}, f"That did not work: {reason}.", [reason]
    keys = [draw.word() if draw.chance(0.2) else draw.pick(_RESULTS) for _ in range(draw.between(1, 4))]
    result: dict[str, Any] = {}
    for key in keys:
        r = draw.random()
        result[key] = (
            draw.between(0, 999) if r < 0.4 else draw.word() if r < 0.6 else draw.name() if r < 0.8 else draw.code()
        )
    said = [f"the {key} is {value}" for key, value in result.items()]
    answer = _joined(said)
    return result, answer[0].upper() + answer[1:] + ".", [str(value) for value in result.values()]
