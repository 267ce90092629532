"""How one request may use its tools, and how the model's calls and thinking are read from its output."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ....chat.conversation import OfferedTool
from ....chat.template import ChatTemplate
from ....chat.tools.definitions import ToolLimits
from ....chat.tools.detect import detect, ends_in_reasoning
from ....chat.tools.format_types import ReasoningFormat, ToolFormat
from ....chat.tools.formats import check_together, markers, tool_format
from ....chat.tools.parser import StreamParser
from ....chat.tools.reasoning_formats import reasoning_format
from ....config import ServerConfig
from ....errors import InvalidRequest
from ....sampling_params import SamplingParams
from ....tokenizer.tokenizer import Tokenizer
from .output_grammar import OutputGrammar, calls_for
from .spec import ChatSpec

logger = logging.getLogger(__name__)

AUTO, NONE = "auto", "none"  # of the flags: what the chat template seems to write; nothing


@dataclass(frozen=True, slots=True)
class Formats:
    """How the served model writes calls and thinking. None: in no known format."""

    tools: ToolFormat | None
    reasoning: ReasoningFormat | None
    tools_name: str  # the format's name in the grammar
    special: dict[str, int]  # special tokens in their markers, and their ids

    @classmethod
    def of(cls, config: ServerConfig, tokenizer: Tokenizer, template: ChatTemplate) -> Formats:
        """The formats that the flags name, or else those of the checkpoint's chat template."""
        special = {tokenizer.token_text(id): id for id in tokenizer.special_ids}
        found, found_tools = detect(template.source, special), detect(template.for_tools.source, special).tools
        tools = found_tools if config.tool_call_parser == AUTO else config.tool_call_parser
        reasoning = found.reasoning if config.reasoning_parser == AUTO else config.reasoning_parser
        calls = tool_format(tools) if tools and tools != NONE else None
        thoughts = reasoning_format(reasoning) if reasoning and reasoning != NONE else None
        try:
            check_together(calls, thoughts)
        except ValueError as error:  # at least one of them was detected: `startup.check_parsers`
            if config.reasoning_parser == AUTO:
                thoughts = None
            else:
                calls = None
            logger.warning("%s: the %s are read as text", error, "tool calls" if calls is None else "thoughts")
        known = {token: special[token] for token in _special_in(markers(calls, thoughts), special)}
        return cls(calls, thoughts, tools or "", known)


class ToolUse:
    """The tools of one request. Raises `InvalidRequest` for what cannot be done."""

    def __init__(self, spec: ChatSpec, formats: Formats, template: ChatTemplate) -> None:
        choice, offered = spec.tool_choice, spec.conversation.tools
        used = bool(offered) and choice.mode != "none"
        if used and (formats.tools is None or not template.for_tools.writes_tools):
            raise InvalidRequest(
                "tools",
                "are not supported: this model's chat template writes no tool calls in a format that this server "
                "recognises; --tool-call-parser sets one",
            )
        self.offered: Sequence[OfferedTool] = offered if used else ()
        self._special = formats.special
        self._calls = formats.tools if used else None
        self._thoughts = formats.reasoning if spec.separate_reasoning else None
        callable = [tool for tool in self.offered if choice.allows(tool.tool.name)]
        self._tools = [tool.tool for tool in callable]
        self.forced = used and choice.mode == "required"
        enforced = self.forced or choice.names is not None
        calls = calls_for(formats.tools_name, callable, enforced=enforced, parallel=spec.parallel_tool_calls)
        self._grammar = OutputGrammar(calls, self.forced, self._thoughts, formats.special)

    @property
    def keeps_special(self) -> bool:
        """Whether the answer's text must still have its special tokens, for its parser to see them."""
        return bool(_special_in(markers(self._calls, self._thoughts), self._special))

    def constrained(self, params: SamplingParams, prompt: str) -> SamplingParams:
        """See `OutputGrammar.applied`."""
        return self._grammar.applied(params, prompt)

    def parser(self, prompt: str) -> StreamParser | None:
        """For one sample's answer to ``prompt``; None: all of it is content."""
        if self._calls is None and self._thoughts is None:
            return None
        opened = ends_in_reasoning(prompt, self._thoughts)
        return StreamParser(self._calls, self._thoughts, self._tools, reasoning_open=opened)


def _special_in(markers: Iterable[str], special: Iterable[str]) -> list[str]:
    """The tokens of ``special`` that are markers or parts of one, such as ``<|channel>`` of ``<|channel>thought``."""
    return [token for token in special if token and any(token in marker for marker in markers)]


def tool_limits(config: ServerConfig) -> ToolLimits:
    return ToolLimits(tools=config.max_tools)
