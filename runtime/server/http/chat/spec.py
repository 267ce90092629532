"""A chat request, in one form for all dialects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast, get_args

from ....chat.conversation import Conversation, OfferedTool
from ....chat.openai_messages import label
from ....errors import InvalidRequest, shown
from ....sampling_params import SamplingParams
from ..fields.cache import CacheFields
from ..fields.parse import MAX_ENTRIES

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
    """One request. ``params``: the client's, not yet checked against the server's limits."""

    conversation: Conversation
    params: SamplingParams
    cache: CacheFields
    tool_choice: ToolChoice = _ANY_CALLS
    parallel_tool_calls: bool = True
    separate_reasoning: bool = True
    priority: int = 0
    stream: bool = False
    echo_tokens: bool = False  # the answer has the prompt's token ids
    shorten: bool = False  # max_tokens may be more than the context leaves
    names: Mapping[str, str]  # the client's names of our fields, as `InvalidRequest.renamed` takes them


def openai_tool_choice(choice: Any, tools: Sequence[OfferedTool]) -> ToolChoice:
    """OpenAI's ``tool_choice``: none, auto, required, one tool by its name, or ``allowed_tools``."""
    if choice is None:
        return _ANY_CALLS
    if isinstance(choice, str):
        if choice not in get_args(Mode):
            raise InvalidRequest("tool_choice", f"must be none, auto, required or a function, got {shown(choice)}")
        if choice == "required" and not tools:
            raise InvalidRequest("tool_choice", "cannot be required without tools")
        return ToolChoice(cast(Mode, choice))
    if choice.get("type") == "allowed_tools":
        return _allowed_tools(choice, tools)
    return ToolChoice("required", (_tool_name(choice, "tool_choice", tools),))


def named_tool(name: str, tools: Sequence[OfferedTool]) -> ToolChoice:
    """A call of this tool is required. Raises `InvalidRequest` if it is none of ``tools``."""
    return ToolChoice("required", (_tool_name({"type": "function", "name": name}, "tool_choice", tools),))


def _allowed_tools(choice: Mapping[str, Any], tools: Sequence[OfferedTool]) -> ToolChoice:
    """Some of the tools. The prompt keeps all of them, so that it stays cached; only calls are restricted."""
    allowed, path = choice, "tool_choice"
    if "allowed_tools" in choice:  # chat completions nest it
        allowed, path = choice["allowed_tools"], "tool_choice.allowed_tools"
        if not isinstance(allowed, Mapping):
            raise InvalidRequest(path, f"must be an object, got {type(allowed).__name__}")
    mode, entries = allowed.get("mode", "auto"), allowed.get("tools")
    if mode not in ("auto", "required"):
        raise InvalidRequest(f"{path}.mode", f"must be auto or required, got {shown(mode)}")
    if not isinstance(entries, list) or not entries:
        raise InvalidRequest(f"{path}.tools", "must be a list of tools, not empty")
    if len(entries) > MAX_ENTRIES:
        raise InvalidRequest(f"{path}.tools", f"must have at most {MAX_ENTRIES} entries, got {len(entries)}")
    names = [_tool_name(entry, f"{path}.tools[{i}]", tools) for i, entry in enumerate(entries)]
    return ToolChoice(mode, tuple(names))


def _tool_name(choice: Any, path: str, tools: Sequence[OfferedTool]) -> str:
    """The model's name of the tool that ``choice`` names."""
    kind = choice.get("type") if isinstance(choice, Mapping) else None
    if kind not in ("function", "custom"):
        raise InvalidRequest(f"{path}.type", f"must be function or custom, got {shown(kind)}")
    named = choice.get(kind, choice)
    within = path if named is choice else f"{path}.{kind}"
    name = label(named.get("name") if isinstance(named, Mapping) else None, f"{within}.name")
    namespace = named.get("namespace")
    for offered in tools:
        if offered.tool.name == name or (offered.name == name and namespace in (None, offered.namespace)):
            return offered.tool.name
    raise InvalidRequest(path, f"names {shown(name)}, which is not one of tools")
