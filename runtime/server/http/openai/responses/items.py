"""The items of a responses request, read into turns."""

from __future__ import annotations

from typing import Any

from .....chat.conversation import MAX_PARTS, ChatTurn, Part, TextPart, ThinkingPart
from .....chat.openai_messages import check_pieces, label, read_breakpoint, read_call, read_texts
from .....errors import InvalidRequest, shown

ROLES = ("user", "system", "developer", "assistant")
_CALLS = ("function_call", "function_call_output", "custom_tool_call", "custom_tool_call_output")
_TYPES = ("message", *_CALLS, "reasoning")
# What tools that run elsewhere have left in a history. Templates have no place for it, so it is left out and named.
_HOSTED = {
    "apply_patch_call",
    "apply_patch_call_output",
    "code_interpreter_call",
    "compaction",
    "computer_call",
    "computer_call_output",
    "file_search_call",
    "image_generation_call",
    "local_shell_call",
    "local_shell_call_output",
    "mcp_approval_request",
    "mcp_approval_response",
    "mcp_call",
    "mcp_list_tools",
    "shell_call",
    "shell_call_output",
    "web_search_call",
}


def response_turns(instructions: str | None, input: Any, max_items: int, left_out: list[str]) -> list[ChatTurn]:
    """Raises `InvalidRequest` naming the item and the field in it.

    ``left_out`` gets the path and type of each item of a tool that runs elsewhere.
    """
    turns = (
        [] if instructions is None else [ChatTurn("system", [TextPart(instructions, "instructions")], "instructions")]
    )
    if isinstance(input, str):
        return [*turns, ChatTurn("user", [TextPart(input, "input")], "input")]
    if not isinstance(input, list):
        raise InvalidRequest("input", f"must be a string or a list of items, got {type(input).__name__}")
    if not input:
        raise InvalidRequest("input", "must not be empty")
    if len(input) > max_items:
        raise InvalidRequest("input", f"must have at most {max_items} items, got {len(input)}")
    check_pieces(input, ("content", "output"), "input")
    reader = _ItemReader(turns)
    for i, item in enumerate(input):
        kind = item.get("type") if isinstance(item, dict) else None
        if isinstance(kind, str) and kind in _HOSTED:
            left_out.append(f"input[{i}] {kind}")
        else:
            reader.read(item, f"input[{i}]")
    if not turns:
        raise InvalidRequest("input", f"must have an item that this server takes: {', '.join(_TYPES)}")
    return turns


class _ItemReader:
    """One turn of a model is several items and one `ChatTurn`: thinking, text, calls.

    An item joins the turn before it unless that would change their order as templates write it.
    """

    def __init__(self, turns: list[ChatTurn]) -> None:
        self._turns = turns
        self._open: ChatTurn | None = None  # the last turn, while it may get more items

    def read(self, item: Any, path: str) -> None:
        if not isinstance(item, dict):
            raise InvalidRequest(path, f"must be an object, got {type(item).__name__}")
        kind = item.get("type")
        if kind is None and "role" in item:
            kind = "message"
        match kind:
            case "message":
                self._message(item, path)
            case "function_call" | "custom_tool_call":
                id = label(item.get("call_id"), f"{path}.call_id")
                call = read_call(item, id, path, read_breakpoint(item, path), custom=kind == "custom_tool_call")
                self._assistant(path).parts.append(call)
            case "function_call_output" | "custom_tool_call_output":
                id = label(item.get("call_id"), f"{path}.call_id")
                parts = read_texts(item.get("output"), f"{path}.output", "tool")
                self._add(ChatTurn("tool", parts, path, call_id=id))
            case "reasoning":
                self._reasoning(item, path)
            case None:
                raise InvalidRequest(f"{path}.type", "is required")
            case _:
                known = f"it takes {', '.join(_TYPES)}"
                raise InvalidRequest(f"{path}.type", f"{shown(kind)} is not supported by this server: {known}")

    def _message(self, item: dict[str, Any], path: str) -> None:
        role = item.get("role")
        if role not in ROLES:
            raise InvalidRequest(f"{path}.role", f"must be one of {', '.join(ROLES)}, got {shown(role)}")
        texts = read_texts(item.get("content"), f"{path}.content", role)
        if role != "assistant":
            self._add(ChatTurn(role, texts, path))
            return
        self._assistant(path, unless=TextPart).parts += texts

    def _reasoning(self, item: dict[str, Any], path: str) -> None:
        """Readable thinking. ``encrypted_content``, another provider's, is skipped: this server cannot decrypt it."""
        texts = _texts(item.get("content"), f"{path}.content") or _texts(item.get("summary"), f"{path}.summary")
        if texts:
            self._assistant(path, unless=Part).parts += [ThinkingPart(text) for text in texts]

    def _assistant(self, path: str, unless: Any = ()) -> ChatTurn:
        """The assistant's turn that the item joins: the last one, unless it has a part of the kind ``unless``."""
        if self._open is None or (unless and any(isinstance(part, unless) for part in self._open.parts)):
            turn = ChatTurn("assistant", [], path)
            self._add(turn)
            self._open = turn
        return self._open

    def _add(self, turn: ChatTurn) -> None:
        self._open = None
        self._turns.append(turn)


def _texts(parts: Any, path: str) -> list[str]:
    """The texts of thinking or of its summary; either may be missing."""
    if parts is None:
        return []
    if not isinstance(parts, list):
        raise InvalidRequest(path, f"must be a list of parts, got {type(parts).__name__}")
    if len(parts) > MAX_PARTS:
        raise InvalidRequest(path, f"must have at most {MAX_PARTS} parts, got {len(parts)}")
    texts = []
    for i, part in enumerate(parts):
        text = part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str):
            raise InvalidRequest(f"{path}[{i}]", "must be an object with a text, a string")
        texts.append(text)
    return texts
