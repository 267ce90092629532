"""Anthropic's system, messages and tools, read into a conversation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ....chat.conversation import (
    MAX_PARTS,
    MAX_PIECES,
    Breakpoint,
    CallPart,
    ChatTurn,
    OfferedTool,
    Part,
    TextPart,
    ThinkingPart,
)
from ....chat.openai_messages import label
from ....chat.tools.definitions import ToolLimits, ToolReader
from ....chat.volatile import without_billing_header
from ....errors import InvalidRequest, shown
from ..fields.cache import MAX_BREAKPOINTS
from ..fields.parse import parse
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

ERROR = "Error:"  # the line before the content of a tool_result with is_error
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

M = TypeVar("M", bound=BaseModel)


class ConversationReader:
    """Reads ``tools`` and ``turns`` of one request. Raises `InvalidRequest` naming the block.

    Messages of one role in a row are one turn, as Anthropic has it. A ``tool_result`` is a turn of its own, in its
    place among the user's texts. Claude Code's billing header is left out of the system prompt: it changes with every
    request, so nothing after it could be reused.
    """

    def __init__(self, body: CountRequest, max_messages: int, limits: ToolLimits | None = None) -> None:
        self.turns: list[ChatTurn] = []
        self.tools: list[OfferedTool] = []
        self.left_out: list[str] = []  # tools that run on Anthropic's servers or have no schema here: path and type
        self._tool_names: dict[str, str] = {}  # of the tool_use blocks so far, by their ids
        self._blocks = 0
        self._breakpoints = 0
        self._last: TextPart | CallPart | None = None  # made from the last block that can have a breakpoint
        self._read_tools(body.tools or [], limits)
        if body.system:
            for block, path in self._read(body.system, "system", _TEXT):
                if isinstance(block, TextBlock) and (text := without_billing_header(block.text)):
                    block = block.model_copy(update={"text": text})
                    self._text(self._turn("system", "system").parts, block, path)
        self._read_messages(body.messages, max_messages)
        if body.cache_control is not None and self._last is not None and self._last.breakpoint is None:
            self._last.breakpoint = self._breakpoint(body.cache_control, "cache_control")

    @property
    def continued(self) -> bool:
        """Whether the last message is the beginning of the answer."""
        return self.turns[-1].role == "assistant"

    def _read_messages(self, messages: Sequence[Any], most: int) -> None:
        if not messages:
            raise InvalidRequest("messages", "must not be empty")
        if len(messages) > most:
            raise InvalidRequest("messages", f"must have at most {most} entries, got {len(messages)}")
        for i, message in enumerate(messages):
            self._message(message, f"messages[{i}]", last=i == len(messages) - 1)
        if self.continued and self.turns[-1].calls:
            raise InvalidRequest(
                f"messages[{len(messages) - 1}]", "must be followed by one with the tool_result of its tool_use"
            )

    def _message(self, message: Any, path: str, *, last: bool) -> None:
        if not isinstance(message, dict):
            raise InvalidRequest(path, f"must be an object, got {type(message).__name__}")
        role = message.get("role")
        if not isinstance(role, str) or role not in _BLOCKS:
            raise InvalidRequest(f"{path}.role", f"must be user, assistant or system, got {shown(role)}")
        content = message.get("content")
        if content is not None and not content and not (last and role == "assistant"):
            raise InvalidRequest(f"{path}.content", "must not be empty, but in a last message of role assistant")
        if role == "assistant":
            self._turn(role, path)  # it may be empty
        for block, place in self._read(content, f"{path}.content", _BLOCKS[role]):
            match block:
                case TextBlock():
                    self._text(self._turn(role, path).parts, block, place)
                case ToolUseBlock():
                    self._call(self._turn(role, path).parts, block, place)
                case ToolResultBlock():
                    self._result(block, place)
                case ThinkingBlock():
                    self._turn(role, path).parts.append(ThinkingPart(block.thinking))

    def _read(self, content: Any, path: str, kinds: Mapping[str, type[BaseModel]]) -> Iterator[tuple[BaseModel, str]]:
        """The blocks of a content, and their paths."""
        if isinstance(content, str):
            yield TextBlock(type="text", text=content), path
            return
        if not isinstance(content, list):
            problem = f"must be a string or a list of blocks, got {type(content).__name__}"
            raise InvalidRequest(path, "is required" if content is None else problem)
        if len(content) > MAX_PARTS:
            raise InvalidRequest(path, f"must have at most {MAX_PARTS} blocks, got {len(content)}")
        for i, block in enumerate(content):
            yield self._block(block, f"{path}[{i}]", kinds), f"{path}[{i}]"

    def _block(self, block: Any, path: str, kinds: Mapping[str, type[BaseModel]]) -> BaseModel:
        if not isinstance(block, dict):
            raise InvalidRequest(path, f"must be an object, got {type(block).__name__}")
        kind = block.get("type")
        model = kinds.get(kind) if isinstance(kind, str) else None
        if model is None:
            if kind in _OTHER_MEDIA:
                raise InvalidRequest(
                    f"{path}.type", f"{kind} is not supported: this server reads text only and fetches nothing"
                )
            raise InvalidRequest(f"{path}.type", f"must be one of {', '.join(kinds)} here, got {shown(kind)}")
        if "cache_control" not in model.model_fields and block.get("cache_control") is not None:
            raise InvalidRequest(
                f"{path}.cache_control", f"cannot be set on {kind}: mark the block before it or after it"
            )
        return self._parsed(model, block, path)

    def _parsed(self, model: type[M], value: dict[str, Any], path: str) -> M:
        self._blocks += 1
        if self._blocks > MAX_PIECES:
            raise InvalidRequest(path, f"is one too many: a request must have at most {MAX_PIECES} blocks and tools")
        try:
            return model.model_validate(value)
        except ValidationError:  # with a null where a field may be left out, or wrong
            return parse(model, value, f"{path}.", frozenset())

    # -- conversion ---------------------------------------------------------------------------------------------------

    def _turn(self, role: Any, path: str) -> ChatTurn:
        """The turn that this role's blocks go to."""
        if not self.turns or self.turns[-1].role != role:
            self.turns.append(ChatTurn(role, [], path))
        return self.turns[-1]

    def _text(self, parts: list[Part], block: Any, path: str) -> TextPart:
        text = TextPart(block.text, path, self._breakpoint(block.cache_control, f"{path}.cache_control"))
        parts.append(text)
        self._last = text
        return text

    def _call(self, parts: list[Part], block: ToolUseBlock, path: str) -> None:
        id, name = label(block.id, f"{path}.id"), label(block.name, f"{path}.name")
        breakpoint = self._breakpoint(block.cache_control, f"{path}.cache_control")
        self._last = CallPart(name, block.input, id, path, breakpoint)
        self._tool_names[id] = name
        parts.append(self._last)

    def _result(self, block: ToolResultBlock, path: str) -> None:
        name = self._tool_names.get(block.tool_use_id)
        if name is None:
            raise InvalidRequest(
                f"{path}.tool_use_id", f"is that of no tool_use before it, got {shown(block.tool_use_id)}"
            )
        last = TextPart(ERROR if block.is_error else "", path)
        turn = ChatTurn("tool", [last] if block.is_error else [], path, name, block.tool_use_id)
        self.turns.append(turn)
        for text, place in self._read(block.content, f"{path}.content", _TEXT):
            last = self._text(turn.parts, text, place)
        if not turn.parts:
            turn.parts.append(last)
        last.breakpoint = self._breakpoint(block.cache_control, f"{path}.cache_control") or last.breakpoint
        self._last = last

    def _read_tools(self, tools: list[Any], limits: ToolLimits | None) -> None:
        reader = ToolReader(limits)
        reader.check_count(tools)
        for i, tool in enumerate(tools):
            self._tool(tool, f"tools[{i}]", reader)

    def _tool(self, tool: Any, path: str, reader: ToolReader) -> None:
        if not isinstance(tool, dict):
            raise InvalidRequest(path, f"must be an object, got {type(tool).__name__}")
        kind = tool.get("type")
        if isinstance(kind, str) and kind not in ("custom", "function"):
            self.left_out.append(f"{path} {kind[:60]}")
            return
        if kind not in (None, "custom"):
            raise InvalidRequest(f"{path}.type", f"must be custom, got {shown(kind)}")
        found = self._parsed(ToolDefinition, tool, path)
        checked = reader.read(tool, path, path, "input_schema")
        function: dict[str, Any] = {"name": found.name}
        if found.description is not None:
            function["description"] = found.description
        if found.input_examples:
            examples = "\n".join(json.dumps(example, ensure_ascii=False) for example in found.input_examples)
            function["description"] = f"{found.description or ''}\n\nExamples of its input:\n{examples}".lstrip()
        definition = {"type": "function", "function": function | {"parameters": found.input_schema}}
        breakpoint = self._breakpoint(found.cache_control, f"{path}.cache_control")
        schema_path = f"{path}.input_schema"
        self.tools.append(OfferedTool(checked, definition, schema_path, breakpoint, name=found.name))

    def _breakpoint(self, control: CacheControl | None, path: str) -> Breakpoint | None:
        if control is None:
            return None
        self._breakpoints += 1
        if self._breakpoints > MAX_BREAKPOINTS:
            raise InvalidRequest(path, f"is one too many: a request must have at most {MAX_BREAKPOINTS} of them")
        return Breakpoint(control.ttl)
