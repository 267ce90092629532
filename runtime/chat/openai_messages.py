"""OpenAI's messages, as clients and `Engine.chat` send them, read into turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast, get_args

from ..errors import InvalidRequest, shown
from ..limits import MAX_LABEL
from .conversation import MAX_PARTS, MAX_PIECES, Breakpoint, CallPart, ChatTurn, Part, Role, TextPart, ThinkingPart
from .custom_tools import custom_arguments

ROLES = get_args(Role)
_TEXT_PARTS = ("text", "input_text", "output_text")
_OTHER_PARTS = ("image_url", "input_image", "input_audio", "audio_url", "video_url", "file", "input_file")
_ANTHROPIC_TTL = "5m"  # the ttl of a ``cache_control`` that names none


def openai_turns(messages: Sequence[Any], max_messages: int | None = None) -> list[ChatTurn]:
    """Raises `InvalidRequest` naming the message and the field in it."""
    if not messages:
        raise InvalidRequest("messages", "must not be empty")
    if max_messages is not None and len(messages) > max_messages:
        raise InvalidRequest("messages", f"must have at most {max_messages} entries, got {len(messages)}")
    check_pieces(messages, ("content", "tool_calls"), "messages")
    return [_turn(message, f"messages[{i}]") for i, message in enumerate(messages)]


def check_pieces(entries: Sequence[Any], fields: Sequence[str], path: str) -> None:
    """Bounds the lists in ``fields`` of all entries together, before any of them is read."""
    lists = (entry.get(name) for entry in entries if isinstance(entry, Mapping) for name in fields)
    pieces = sum(len(value) for value in lists if isinstance(value, list))
    if pieces > MAX_PIECES:
        raise InvalidRequest(path, f"must have at most {MAX_PIECES} parts and calls together, got {pieces}")


def _turn(message: Any, path: str) -> ChatTurn:
    if not isinstance(message, Mapping):
        raise InvalidRequest(path, f"must be an object, got {type(message).__name__}")
    role = message.get("role")
    if role == "function":
        raise InvalidRequest(f"{path}.role", "function is not supported; answer a call with a message of role tool")
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidRequest(f"{path}.role", f"must be one of {', '.join(ROLES)}, got {shown(role)}")
    for name in ("function_call", "audio"):
        if message.get(name) is not None:
            raise InvalidRequest(f"{path}.{name}", "is not supported by this server")
    turn = ChatTurn(cast(Role, role), [], path)
    if role == "assistant":
        for name in ("reasoning_content", "reasoning"):
            if message.get(name) is not None:
                turn.parts.append(ThinkingPart(string(message[name], f"{path}.{name}")))
                break
    content = message.get("content")
    if content is not None or role != "assistant":
        turn.parts += read_texts(content, f"{path}.content", role)
    turn.parts += _calls(message.get("tool_calls"), role, f"{path}.tool_calls")
    if message.get("name") is not None:
        turn.name = label(message["name"], f"{path}.name")
    if message.get("tool_call_id") is not None:
        turn.call_id = label(message["tool_call_id"], f"{path}.tool_call_id")
    return turn


def read_texts(content: Any, path: str, role: str) -> list[Part]:
    """A content: a string or a list of text parts."""
    if isinstance(content, str):
        return [TextPart(content, path)]
    if content is None:
        raise InvalidRequest(path, "is required")
    if not isinstance(content, list):
        raise InvalidRequest(path, f"must be a string or a list of parts, got {type(content).__name__}")
    if len(content) > MAX_PARTS:
        raise InvalidRequest(path, f"must have at most {MAX_PARTS} parts, got {len(content)}")
    return [_text(part, f"{path}[{i}]", role) for i, part in enumerate(content)]


def _text(part: Any, path: str, role: str) -> TextPart:
    if isinstance(part, str):
        return TextPart(part, path)
    if not isinstance(part, dict):
        raise InvalidRequest(path, f"must be an object, got {type(part).__name__}")
    kind = part.get("type")
    if kind in _TEXT_PARTS:
        return TextPart(string(part.get("text"), f"{path}.text"), path, read_breakpoint(part, path))
    if kind == "refusal" and role == "assistant":
        return TextPart(string(part.get("refusal"), f"{path}.refusal"), path, read_breakpoint(part, path))
    if kind in _OTHER_PARTS:
        raise InvalidRequest(
            f"{path}.type", f"{kind} is not supported: this server reads text only and fetches nothing"
        )
    raise InvalidRequest(f"{path}.type", f"must be one of {', '.join(_TEXT_PARTS)}, got {shown(kind)}")


def _calls(calls: Any, role: str, path: str) -> list[CallPart]:
    if not calls:
        return []
    if role != "assistant":
        raise InvalidRequest(path, f"belong to a message of role assistant, not {role}")
    if not isinstance(calls, list):
        raise InvalidRequest(path, f"must be a list, got {type(calls).__name__}")
    return [_call(call, f"{path}[{i}]") for i, call in enumerate(calls)]


def _call(call: Any, path: str) -> CallPart:
    if not isinstance(call, dict):
        raise InvalidRequest(path, f"must be an object, got {type(call).__name__}")
    kind = call.get("type", "function")
    if kind not in ("function", "custom"):
        raise InvalidRequest(f"{path}.type", f"must be function or custom, got {shown(kind)}")
    function = call.get(kind)
    if not isinstance(function, dict):
        raise InvalidRequest(f"{path}.{kind}", "must be an object")
    id = None if call.get("id") is None else label(call["id"], f"{path}.id")
    return read_call(function, id, f"{path}.{kind}", read_breakpoint(call, path), custom=kind == "custom")


def read_call(
    function: Mapping[str, Any], id: str | None, path: str, breakpoint: Breakpoint | None, *, custom: bool = False
) -> CallPart:
    """``function``: an object with a name and arguments, a JSON object or its text; none means no arguments.

    ``custom``: of a custom tool, with a text as its input.
    """
    name = label(function.get("name"), f"{path}.name")
    if function.get("namespace") is not None:
        name = namespaced(label(function["namespace"], f"{path}.namespace"), name)
    if custom:
        return CallPart(name, custom_arguments(string(function.get("input"), f"{path}.input")), id, path, breakpoint)
    arguments = function.get("arguments")
    if not isinstance(arguments, dict):
        text = "" if arguments is None else string(arguments, f"{path}.arguments")
        arguments = text if text.strip() else "{}"
    return CallPart(name, arguments, id, path, breakpoint)


def namespaced(namespace: str, name: str) -> str:
    """The model's name of a tool in a namespace."""
    return f"{namespace.rstrip('_')}__{name}"


def read_breakpoint(value: Mapping[str, Any], path: str) -> Breakpoint | None:
    """A part's, call's or tool's cache breakpoint: ``prompt_cache_breakpoint`` or Anthropic's ``cache_control``."""
    ours, theirs = value.get("prompt_cache_breakpoint"), value.get("cache_control")
    if ours is True:
        return Breakpoint()
    if ours is not None:
        if not isinstance(ours, Mapping):
            raise InvalidRequest(f"{path}.prompt_cache_breakpoint", f"must be an object, got {type(ours).__name__}")
        return Breakpoint(ours.get("ttl"))
    if theirs is None:
        return None
    if not isinstance(theirs, Mapping):
        raise InvalidRequest(f"{path}.cache_control", f"must be an object, got {type(theirs).__name__}")
    if theirs.get("type") != "ephemeral":
        raise InvalidRequest(f"{path}.cache_control.type", f"must be ephemeral, got {shown(theirs.get('type'))}")
    ttl = theirs.get("ttl")
    return Breakpoint(_ANTHROPIC_TTL if ttl is None else ttl)


def label(value: Any, path: str) -> str:
    """A short string: a name or an id."""
    text = string(value, path)
    if not 0 < len(text) <= MAX_LABEL:
        raise InvalidRequest(path, f"must have 1 to {MAX_LABEL} characters, got {len(text)}")
    return text


def string(value: Any, path: str) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(path, "is required" if value is None else f"must be a string, got {type(value).__name__}")
    return value
