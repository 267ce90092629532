"""From Anthropic's system, messages and tools to those of a chat: every block checked, in the client's words."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ....chat.messages import MAX_PARTS, label
from ..fields.cache import MAX_BREAKPOINTS
from ..fields.requests import parse
from ..plumbing.errors import bad, shown
from .request import (
    CacheControl,
    CountRequest,
    RedactedThinkingBlock,
    TextBlock,
    ThinkingBlock,
    ToolDefinition,
    ToolResultBlock,
    ToolUseBlock,
)

MAX_BLOCKS = 16_384  # of one request, its tools among them
ERROR = "Error:"  # the line a template is given before the content of a tool_result with is_error
_TEXT: Mapping[str, type[BaseModel]] = {"text": TextBlock}
_BLOCKS: Mapping[str, Mapping[str, type[BaseModel]]] = {
    "user": {**_TEXT, "tool_result": ToolResultBlock},
    "assistant": {
        **_TEXT,
        "tool_use": ToolUseBlock,
        "thinking": ThinkingBlock,
        "redacted_thinking": RedactedThinkingBlock,
    },
    "system": _TEXT,
}
_OTHER_MEDIA = ("image", "document", "search_result", "container_upload", "tool_reference")
_OTHER_TOOLS = ("defer_loading", "input_examples")  # of a tool's definition

M = TypeVar("M", bound=BaseModel)


class Conversation:
    """What a request says, as a chat has it. Raises `InvalidRequest` naming the block.

    Messages of one role in a row are one turn, as Anthropic has it. A ``tool_result`` is a message of its own, in its
    place among the user's; an assistant's turn is its thinking, then its text, then its calls, whatever their order.
    ``sources``: where each of ``messages`` begins in the request.
    """

    def __init__(self, body: CountRequest, max_messages: int) -> None:
        self.messages: list[dict[str, Any]] = []
        self.tools: list[dict[str, Any]] | None = None
        self.sources: dict[str, str] = {}
        self._tool_names: dict[str, str] = {}  # of the tool_use blocks so far, by their ids
        self._blocks = 0
        self._marks = 0
        self._last: dict[str, Any] | None = None  # what the last block that can be marked became
        if body.tools:
            self.tools = [self._tool(tool, f"tools[{i}]") for i, tool in enumerate(body.tools)]
        if body.system:
            for block, where in self._read(body.system, "system", _TEXT):
                self._text(self._turn("system", "system"), block, where)
        if not body.messages:
            raise bad("messages", "must not be empty")
        if len(body.messages) > max_messages:
            raise bad("messages", f"must have at most {max_messages} entries, got {len(body.messages)}")
        for i, message in enumerate(body.messages):
            self._message(message, f"messages[{i}]", last=i == len(body.messages) - 1)
        for message in self.messages:
            if thoughts := message.pop("thoughts", None):
                message["reasoning_content"] = "\n".join(thoughts)
        if self.continued and self.messages[-1].get("tool_calls"):
            raise bad(
                f"messages[{len(body.messages) - 1}]", "must be followed by one with the tool_result of its tool_use"
            )
        if body.cache_control is not None and self._last is not None and "cache_control" not in self._last:
            self._mark(self._last, body.cache_control, "cache_control")

    @property
    def continued(self) -> bool:
        """Whether the last message is the beginning of the answer."""
        return bool(self.messages[-1]["role"] == "assistant")

    def _message(self, message: Any, where: str, *, last: bool) -> None:
        if not isinstance(message, dict):
            raise bad(where, f"must be an object, got {type(message).__name__}")
        role = message.get("role")
        if not isinstance(role, str) or role not in _BLOCKS:
            raise bad(f"{where}.role", f"must be user, assistant or system, got {shown(role)}")
        content = message.get("content")
        if content is not None and not content and not (last and role == "assistant"):
            raise bad(f"{where}.content", "must not be empty, but in a last message of role assistant")
        if role == "assistant":
            self._turn(role, where)  # it may be empty
        for block, place in self._read(content, f"{where}.content", _BLOCKS[role]):
            match block:
                case TextBlock():
                    self._text(self._turn(role, where), block, place)
                case ToolUseBlock():
                    self._call(self._turn(role, where), block, place)
                case ToolResultBlock():
                    self._result(block, place)
                case ThinkingBlock():
                    self._turn(role, where).setdefault("thoughts", []).append(block.thinking)

    def _read(self, content: Any, where: str, kinds: Mapping[str, type[BaseModel]]) -> Iterator[tuple[BaseModel, str]]:
        """The blocks of a content, and where they are."""
        if isinstance(content, str):
            yield TextBlock(type="text", text=content), where
            return
        if not isinstance(content, list):
            problem = f"must be a string or a list of blocks, got {type(content).__name__}"
            raise bad(where, "is required" if content is None else problem)
        if len(content) > MAX_PARTS:
            raise bad(where, f"must have at most {MAX_PARTS} blocks, got {len(content)}")
        for i, block in enumerate(content):
            yield self._block(block, f"{where}[{i}]", kinds), f"{where}[{i}]"

    def _block(self, block: Any, where: str, kinds: Mapping[str, type[BaseModel]]) -> BaseModel:
        if not isinstance(block, dict):
            raise bad(where, f"must be an object, got {type(block).__name__}")
        kind = block.get("type")
        model = kinds.get(kind) if isinstance(kind, str) else None
        if model is None:
            if kind in _OTHER_MEDIA:
                raise bad(f"{where}.type", f"{kind} is not supported: this server reads text only and fetches nothing")
            raise bad(f"{where}.type", f"must be one of {', '.join(kinds)} here, got {shown(kind)}")
        if "cache_control" not in model.model_fields and block.get("cache_control") is not None:
            raise bad(f"{where}.cache_control", f"cannot be set on {kind}: mark the block before it or after it")
        return self._parsed(model, block, where)

    def _parsed(self, model: type[M], value: dict[str, Any], where: str) -> M:
        self._blocks += 1
        if self._blocks > MAX_BLOCKS:
            raise bad(where, f"is one too many: a request must have at most {MAX_BLOCKS} blocks and tools")
        try:
            return model.model_validate(value)
        except ValidationError:  # with a null where a field may be left out, or wrong
            return parse(model, value, f"{where}.", frozenset())

    # -- what becomes of them ------------------------------------------------------------------------------------------

    def _turn(self, role: str, where: str) -> dict[str, Any]:
        """The message that this role's text goes to."""
        if not self.messages or self.messages[-1]["role"] != role:
            self._add({"role": role, "content": []}, where)
        return self.messages[-1]

    def _add(self, message: dict[str, Any], where: str) -> None:
        self.sources[f"messages[{len(self.messages)}]"] = where
        self.messages.append(message)

    def _text(self, message: dict[str, Any], block: Any, where: str) -> None:
        part = {"type": "text", "text": block.text}
        message["content"].append(part)
        self._mark(part, block.cache_control, f"{where}.cache_control")

    def _call(self, message: dict[str, Any], block: ToolUseBlock, where: str) -> None:
        id, name = label(block.id, f"{where}.id"), label(block.name, f"{where}.name")
        arguments = json.dumps(block.input, ensure_ascii=False)  # with the spaces that models write
        call = {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
        message.setdefault("tool_calls", []).append(call)
        self._tool_names[id] = name
        self._mark(call, block.cache_control, f"{where}.cache_control")

    def _result(self, block: ToolResultBlock, where: str) -> None:
        name = self._tool_names.get(block.tool_use_id)
        if name is None:
            raise bad(f"{where}.tool_use_id", f"is that of no tool_use before it, got {shown(block.tool_use_id)}")
        parts = [{"type": "text", "text": ERROR}] if block.is_error else []
        message = {"role": "tool", "tool_call_id": block.tool_use_id, "name": name, "content": parts}
        self._add(message, where)
        for text, place in self._read(block.content, f"{where}.content", _TEXT):
            self._text(message, text, place)
        if not parts:
            parts.append({"type": "text", "text": ""})
        self._mark(parts[-1], block.cache_control, f"{where}.cache_control")

    def _tool(self, tool: Any, where: str) -> dict[str, Any]:
        if not isinstance(tool, dict):
            raise bad(where, f"must be an object, got {type(tool).__name__}")
        kind = tool.get("type")
        if kind not in (None, "custom"):
            raise bad(f"{where}.type", f"must be custom: this server runs no tools of its own, got {shown(kind)}")
        for name in _OTHER_TOOLS:
            if tool.get(name) not in (None, False, []):
                raise bad(f"{where}.{name}", "is not supported by this server")
        found = self._parsed(ToolDefinition, tool, where)
        function: dict[str, Any] = {"name": found.name}
        if found.description is not None:
            function["description"] = found.description
        function |= {"parameters": found.input_schema, "strict": found.strict}
        definition = {"type": "function", "function": function}
        self._mark(definition, found.cache_control, f"{where}.cache_control")
        return definition

    def _mark(self, what: dict[str, Any], control: CacheControl | None, where: str) -> None:
        self._last = what
        if control is None:
            return
        self._marks += 1
        if self._marks > MAX_BREAKPOINTS:
            raise bad(where, f"is one too many: a request must have at most {MAX_BREAKPOINTS} of them")
        what["cache_control"] = {"type": control.type, "ttl": control.ttl}
