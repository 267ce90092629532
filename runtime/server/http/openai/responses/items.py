"""From the items a client sends to the messages of a chat, and where in the request each part of them came from."""

from __future__ import annotations

from typing import Any

from .....chat.messages import MAX_PARTS, label
from ...plumbing.errors import bad, shown

ROLES = ("user", "system", "developer", "assistant")
_TYPES = ("message", "function_call", "function_call_output", "reasoning")


class Conversation:
    """``messages`` of a `ChatRequest`, and for what is in them the ``sources`` that `chat.renamed` wants.

    What a model did in one turn is several items and one message: its thinking, its text, its calls. An item goes into
    the message before it unless that would change their order as templates write it. What a chat checks about a
    message is left to it. Raises `InvalidRequest` naming the item.
    """

    def __init__(self, instructions: str | None, input: Any, most: int) -> None:
        """``most``: items."""
        self.messages: list[dict[str, Any]] = []
        self.sources: dict[str, str] = {"messages": "input"}
        self._turn: dict[str, Any] | None = None  # the last message, while it may get more items
        if instructions is not None:
            self._add({"role": "system", "content": instructions}, "instructions", "")
        if isinstance(input, str):
            self._add({"role": "user", "content": input}, "input", "")
            return
        if not isinstance(input, list):
            raise bad("input", f"must be a string or a list of items, got {type(input).__name__}")
        if not input:
            raise bad("input", "must not be empty")
        if len(input) > most:
            raise bad("input", f"must have at most {most} items, got {len(input)}")
        for i, item in enumerate(input):
            self._item(item, f"input[{i}]")

    def _item(self, item: Any, where: str) -> None:
        if not isinstance(item, dict):
            raise bad(where, f"must be an object, got {type(item).__name__}")
        kind = item.get("type")
        if kind is None and "role" in item:
            kind = "message"
        match kind:
            case "message":
                self._message(item, where)
            case "function_call":
                self._call(item, where)
            case "function_call_output":
                message = {"role": "tool", "content": item.get("output")}
                message["tool_call_id"] = label(item.get("call_id"), f"{where}.call_id")
                self._add(message, where, ".output")
            case "reasoning":
                self._reasoning(item, where)
            case None:
                raise bad(f"{where}.type", "is required")
            case _:
                raise bad(
                    f"{where}.type", f"{shown(kind)} is not supported by this server: it takes {', '.join(_TYPES)}"
                )

    def _message(self, item: dict[str, Any], where: str) -> None:
        role = item.get("role")
        if role not in ROLES:
            raise bad(f"{where}.role", f"must be one of {', '.join(ROLES)}, got {shown(role)}")
        if item.get("content") is None:
            raise bad(f"{where}.content", "is required")
        if role != "assistant":
            self._add({"role": role, "content": item["content"]}, where, ".content")
            return
        turn = self._open(where, unless=("content",))
        turn["content"] = item["content"]
        self._found(".content", f"{where}.content")

    def _call(self, item: dict[str, Any], where: str) -> None:
        id = label(item.get("call_id"), f"{where}.call_id")
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        calls = self._open(where).setdefault("tool_calls", [])
        at = f".tool_calls[{len(calls)}]"
        calls.append({"id": id, "type": "function", "function": function})
        self._found(at, where)
        self._found(f"{at}.function", where)

    def _reasoning(self, item: dict[str, Any], where: str) -> None:
        if item.get("encrypted_content") is not None:
            raise bad(f"{where}.encrypted_content", "is not supported: this server's thinking is in content, readable")
        texts = _texts(item.get("content"), f"{where}.content") or _texts(item.get("summary"), f"{where}.summary")
        if texts:
            turn = self._open(where, unless=("reasoning_content", "content", "tool_calls"))
            turn["reasoning_content"] = "\n".join(texts)
            self._found(".reasoning_content", where)

    def _open(self, where: str, unless: tuple[str, ...] = ()) -> dict[str, Any]:
        """The assistant's message that the item goes into: the last, unless it has one of these already."""
        if self._turn is None or any(name in self._turn for name in unless):
            message: dict[str, Any] = {"role": "assistant"}
            self._add(message, where)
            self._turn = message
        return self._turn

    def _add(self, message: dict[str, Any], where: str, content: str | None = None) -> None:
        """``content``: what the client calls the message's content, within ``where``."""
        self._turn = None
        self.messages.append(message)
        self._found("", where)
        if content is not None:
            self._found(".content", f"{where}{content}")

    def _found(self, path: str, where: str) -> None:
        """``path``: within the last message."""
        self.sources[f"messages[{len(self.messages) - 1}]{path}"] = where


def _texts(parts: Any, where: str) -> list[str]:
    """Of thinking or its summary; neither need be there."""
    if parts is None:
        return []
    if not isinstance(parts, list):
        raise bad(where, f"must be a list of parts, got {type(parts).__name__}")
    if len(parts) > MAX_PARTS:
        raise bad(where, f"must have at most {MAX_PARTS} parts, got {len(parts)}")
    texts = []
    for i, part in enumerate(parts):
        text = part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str):
            raise bad(f"{where}[{i}]", "must be an object with a text, a string")
        texts.append(text)
    return texts
