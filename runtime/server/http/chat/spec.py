"""What a chat request asks for, in one form for all dialects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast, get_args

from ....chat.conversation import Conversation, OfferedTool
from ....chat.openai_messages import label
from ....errors import InvalidRequest, shown
from ....sampling_params import SamplingParams
from ..fields.cache import CacheFields

Mode = Literal["none", "auto", "required"]


class ToolChoice(NamedTuple):
    """Whether the answer has calls, and of which tools; ``names=None``: any."""

    mode: Mode = "auto"
    names: tuple[str, ...] | None = None

    def allows(self, name: str) -> bool:
        return self.names is None or name in self.names


_ANY_CALLS = ToolChoice()


@dataclass(slots=True, kw_only=True)
class ChatSpec:
    """One request. ``params``: as the client asked, not checked against the server's bounds yet."""

    conversation: Conversation
    params: SamplingParams
    cache: CacheFields
    tool_choice: ToolChoice = _ANY_CALLS
    parallel_tool_calls: bool = True
    separate_reasoning: bool = True
    priority: int = 0
    stream: bool = False
    names: Mapping[str, str]  # the client's names of our fields, as `InvalidRequest.renamed` takes them


def openai_tool_choice(choice: Any, tools: Sequence[OfferedTool]) -> ToolChoice:
    """OpenAI's ``tool_choice``: none, auto, required, or one function by its name."""
    if choice is None:
        return _ANY_CALLS
    if isinstance(choice, str):
        if choice not in get_args(Mode):
            raise InvalidRequest("tool_choice", f"must be none, auto, required or a function, got {shown(choice)}")
        if choice == "required" and not tools:
            raise InvalidRequest("tool_choice", "cannot be required without tools")
        return ToolChoice(cast(Mode, choice))
    if choice.get("type") != "function":
        raise InvalidRequest("tool_choice.type", f"must be function, got {shown(choice.get('type'))}")
    function = choice.get("function", choice)
    within = "tool_choice" if function is choice else "tool_choice.function"
    name = label(function.get("name") if isinstance(function, dict) else None, f"{within}.name")
    return named_tool(name, tools)


def named_tool(name: str, tools: Sequence[OfferedTool]) -> ToolChoice:
    """A call of this tool is required. Raises `InvalidRequest` if it is none of ``tools``."""
    if all(offered.tool.name != name for offered in tools):
        raise InvalidRequest("tool_choice", f"names {shown(name)}, which is not one of tools")
    return ToolChoice("required", (name,))
