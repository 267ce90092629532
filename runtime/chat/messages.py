"""From OpenAI's messages to what a chat template is given: every message checked, its text in one string."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from ..errors import bad, shown
from ..limits import MAX_DEPTH, MAX_LABEL
from .json_bounds import deeper_than_now
from .template import ChatTemplate

ROLES = ("system", "developer", "user", "assistant", "tool")
_TEXT_PARTS = ("text", "input_text", "output_text")
_OTHER_PARTS = ("image_url", "input_image", "input_audio", "audio_url", "video_url", "file", "input_file")
MAX_PARTS = 4096  # of one message
MAX_PIECES = 16_384  # of one conversation: parts of its messages, and calls in them


def conversation(messages: Sequence[Any], template: ChatTemplate) -> list[dict[str, Any]]:
    """Messages as ``template`` wants them: only the fields templates know, no nulls.

    A content of several text parts becomes one string, its parts on lines of their own, as vLLM has it. ``developer``
    is ``system`` to a template that does not know the word. A call's arguments stay the text they came as where the
    template writes them verbatim (`ChatTemplate.keeps_arguments`) and are an object elsewhere. Raises `InvalidRequest`
    naming the message.
    """
    pieces = 0
    for message in messages:
        for name in ("content", "tool_calls") if isinstance(message, Mapping) else ():
            value = message.get(name)
            pieces += len(value) if isinstance(value, list) else 0
    if pieces > MAX_PIECES:
        raise bad("messages", f"must have at most {MAX_PIECES} parts and calls together, got {pieces}")
    return [_Message(message, f"messages[{i}]", template).rendered() for i, message in enumerate(messages)]


class _Message:
    """One message on its way; ``where`` names it in errors."""

    def __init__(self, message: Any, where: str, template: ChatTemplate) -> None:
        if not isinstance(message, Mapping):
            raise bad(where, f"must be an object, got {type(message).__name__}")
        self._message = message
        self._where = where
        self._template = template
        role = message.get("role")
        if role == "function":
            raise bad(f"{where}.role", "function is not supported; answer a call with a message of role tool")
        if not isinstance(role, str) or role not in ROLES:
            raise bad(f"{where}.role", f"must be one of {', '.join(ROLES)}, got {shown(role)}")
        self._role: str = role
        for name in ("function_call", "audio"):
            if message.get(name) is not None:
                raise bad(f"{where}.{name}", "is not supported by this server")

    def rendered(self) -> dict[str, Any]:
        calls = self._calls()
        role = self._role
        if role == "developer" and not self._template.knows_developer:
            role = "system"
        result: dict[str, Any] = {"role": role, "content": self._content()}
        for name in ("name", "tool_call_id"):
            value = self._message.get(name)
            if value is not None:
                result[name] = label(value, f"{self._where}.{name}")
        if role == "assistant":
            for name in ("reasoning_content", "reasoning"):
                value = self._message.get(name)
                if value is not None:
                    result["reasoning_content"] = _string(value, f"{self._where}.{name}")
                    break
        if calls:  # templates ask whether the key is there
            result["tool_calls"] = calls
        return result

    def _content(self) -> str:
        content, where = self._message.get("content"), f"{self._where}.content"
        if isinstance(content, str):
            return content
        if content is None:
            if self._role != "assistant":
                raise bad(where, "is required")
            return ""
        if not isinstance(content, list):
            raise bad(where, f"must be a string or a list of parts, got {type(content).__name__}")
        if len(content) > MAX_PARTS:
            raise bad(where, f"must have at most {MAX_PARTS} parts, got {len(content)}")
        return "\n".join(self._part(part, f"{where}[{i}]") for i, part in enumerate(content))

    def _part(self, part: Any, where: str) -> str:
        if isinstance(part, str):
            return part
        if not isinstance(part, dict):
            raise bad(where, f"must be an object, got {type(part).__name__}")
        kind = part.get("type")
        if kind in _TEXT_PARTS:
            return _string(part.get("text"), f"{where}.text")
        if kind == "refusal" and self._role == "assistant":
            return _string(part.get("refusal"), f"{where}.refusal")
        if kind in _OTHER_PARTS:
            raise bad(f"{where}.type", f"{kind} is not supported: this server reads text only and fetches nothing")
        raise bad(f"{where}.type", f"must be one of {', '.join(_TEXT_PARTS)}, got {shown(kind)}")

    def _calls(self) -> list[dict[str, Any]]:
        calls, where = self._message.get("tool_calls"), f"{self._where}.tool_calls"
        if not calls:
            return []
        if self._role != "assistant":
            raise bad(where, f"belong to a message of role assistant, not {self._role}")
        if not isinstance(calls, list):
            raise bad(where, f"must be a list, got {type(calls).__name__}")
        return [self._call(call, f"{where}[{i}]") for i, call in enumerate(calls)]

    def _call(self, call: Any, where: str) -> dict[str, Any]:
        if not isinstance(call, dict):
            raise bad(where, f"must be an object, got {type(call).__name__}")
        if call.get("type", "function") != "function":
            raise bad(f"{where}.type", f"must be function, got {shown(call['type'])}")
        function = call.get("function")
        if not isinstance(function, dict):
            raise bad(f"{where}.function", "must be an object")
        name = label(function.get("name"), f"{where}.function.name")
        arguments = self._arguments(function.get("arguments"), f"{where}.function.arguments")
        result: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
        if call.get("id") is not None:
            result["id"] = label(call["id"], f"{where}.id")
        return result

    def _arguments(self, arguments: Any, where: str) -> str | dict[str, Any]:
        if isinstance(arguments, dict):
            return arguments
        text = _string(arguments, where) if arguments is not None else ""
        if not text.strip():
            text = "{}"
        if self._template.keeps_arguments:
            return text
        if deeper_than_now(text.encode("utf-8", "surrogatepass"), MAX_DEPTH):
            raise bad(where, f"must be nested at most {MAX_DEPTH} deep")
        try:
            value = msgspec.json.decode(text)
        except (msgspec.DecodeError, RecursionError) as error:
            raise bad(where, "must be valid JSON: this model's chat template writes it anew") from error
        if not isinstance(value, dict):
            raise bad(where, f"must be a JSON object, got {type(value).__name__}")
        return value


def label(value: Any, where: str) -> str:
    """A short string: a name or an id."""
    text = _string(value, where)
    if not 0 < len(text) <= MAX_LABEL:
        raise bad(where, f"must have 1 to {MAX_LABEL} characters, got {len(text)}")
    return text


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise bad(where, "is required" if value is None else f"must be a string, got {type(value).__name__}")
    return value
