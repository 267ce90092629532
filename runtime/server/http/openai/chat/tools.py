"""Tools and reasoning of a chat: what a request may ask for, and the parser that reads the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .....chat.messages import label
from .....chat.prompt import definition
from .....chat.template import ChatTemplate
from .....chat.tools import (
    ReasoningFormat,
    StreamParser,
    Tool,
    ToolFormat,
    ToolLimits,
    detect,
    ends_in_reasoning,
    markers,
    reasoning_format,
    tool_format,
    validate_tools,
)
from .....chat.tools.grammar import CallGrammar
from .....config import ServerConfig
from .....errors import InvalidRequest
from .....sampling_params import SamplingParams
from .....tokenizer.tokenizer import Tokenizer
from ...plumbing.errors import bad, shown
from .grammar import OutputGrammar, calls_for
from .request import ChatRequest

AUTO, NONE = "auto", "none"  # of the flags: what the checkpoint seems to write; nothing


@dataclass(frozen=True, slots=True)
class Formats:
    """How the served model writes calls and reasoning. None: not at all, as far as we know."""

    tools: ToolFormat | None
    reasoning: ReasoningFormat | None
    tools_name: str  # as the grammar knows it
    special: dict[str, int]  # of their markers, those that are special tokens, and their ids

    @classmethod
    def of(cls, config: ServerConfig, tokenizer: Tokenizer, template: ChatTemplate) -> Formats:
        """By the flags, else read off the checkpoint."""
        special = {tokenizer.token_text(id): id for id in tokenizer.special_ids}
        found = detect(template.source, special)
        tools = found.tools if config.tool_call_parser == AUTO else config.tool_call_parser
        reasoning = found.reasoning if config.reasoning_parser == AUTO else config.reasoning_parser
        calls = tool_format(tools) if tools and tools != NONE else None
        thoughts = reasoning_format(reasoning) if reasoning and reasoning != NONE else None
        known = {marker: special[marker] for marker in markers(calls, thoughts) if marker in special}
        return cls(calls, thoughts, tools or "", known)


class ToolUse:
    """The tools of one request. Raises `InvalidRequest` for what cannot be done."""

    def __init__(self, request: ChatRequest, formats: Formats, template: ChatTemplate, config: ServerConfig) -> None:
        self.tools = validate_tools(request.tools, tool_limits(config))
        self._parallel = request.parallel_tool_calls
        self._separate = request.separate_reasoning
        self._formats = formats
        self._choice = _choice(request.tool_choice, self.tools)
        self.definitions: list[dict[str, Any]] | None = None  # what the template is given
        self._calls: CallGrammar | None = None
        if not self.tools or self._choice == NONE:
            return
        if formats.tools is None or not template.writes_tools:
            raise bad("tools", "are not supported: this model's chat template has none that this server can read")
        self._calls = calls_for(
            formats.tools_name,
            self.tools,
            forced=self._choice != AUTO,
            named=self._choice[1:] if self._choice.startswith("=") else None,
            parallel=self._parallel,
        )
        self.definitions = [definition(tool) for tool in request.tools or []]

    @property
    def keeps_special(self) -> bool:
        """Whether the answer's text must still have its special tokens, for its parser to see them."""
        calls = self._formats.tools if self.definitions is not None else None
        thoughts = self._formats.reasoning if self._separate else None
        return bool(markers(calls, thoughts) & self._formats.special.keys())

    @property
    def one_call(self) -> bool:
        return not self._parallel

    def constrained(self, params: SamplingParams, prompt: str) -> SamplingParams:
        """With the grammar of what may be written after ``prompt``."""
        thoughts = self._formats.reasoning if self._separate else None
        forced = self._choice not in (AUTO, NONE)
        return OutputGrammar(self._calls, forced, thoughts, self._formats.special).applied(params, prompt)

    def parser(self, prompt: str) -> StreamParser | None:
        """For one sample's answer to ``prompt``; None: all of it is content."""
        calls = self._formats.tools if self.definitions is not None else None
        thoughts = self._formats.reasoning if self._separate else None
        if calls is None and thoughts is None:
            return None
        return StreamParser(calls, thoughts, self.tools, reasoning_open=ends_in_reasoning(prompt, thoughts))


def tool_limits(config: ServerConfig) -> ToolLimits:
    usual = ToolLimits()
    return ToolLimits(
        tools=config.max_tools,
        schema_bytes=min(usual.schema_bytes, config.max_schema_bytes),
        schema_depth=min(usual.schema_depth, config.max_schema_depth),
    )


def _choice(choice: Any, tools: list[Tool]) -> str:
    """``none``, ``auto``, ``required``, or ``=`` and the name of a tool."""
    if choice is None:
        return AUTO
    if isinstance(choice, str):
        if choice not in (NONE, AUTO, "required"):
            raise bad("tool_choice", f"must be none, auto, required or a function, got {shown(choice)}")
        if choice == "required" and not tools:
            raise bad("tool_choice", "cannot be required without tools")
        return choice
    if choice.get("type") != "function":
        raise bad("tool_choice.type", f"must be function, got {shown(choice.get('type'))}")
    function = choice.get("function", choice)
    name = label(function.get("name") if isinstance(function, dict) else None, "tool_choice.function.name")
    if all(tool.name != name for tool in tools):
        raise InvalidRequest(f"tool_choice names {shown(name)}, which is not one of tools", field="tool_choice")
    return f"={name}"
