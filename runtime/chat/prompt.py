"""From what is said of a conversation to its prompt's text: the same from a client of the server and in process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InvalidRequest, bad
from .messages import conversation, label
from .template import ChatTemplate
from .tools.definitions import ToolLimits, validate_tools

# Variables that many clients send whatever the model: a template that does not read them ignores them.
_COMMON_VARIABLES = frozenset(
    {"enable_thinking", "thinking", "thinking_budget", "preserve_thinking", "reasoning_effort", "date_string"}
)
_MAX_VARIABLES = 64
_MARKS = ("prompt_cache_breakpoint", "cache_control")  # what a part, a call or a tool says to stay cached: ours, theirs


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation that has been checked, and what its template is told beside it."""

    template: ChatTemplate
    messages: list[dict[str, Any]]  # as the template wants them
    variables: dict[str, Any]
    add_generation_prompt: bool
    continue_final_message: bool

    def text(self) -> str:
        """With its special tokens: none are to be added. Raises `InvalidRequest` where the template refuses."""
        return self.template.render(
            self.messages, self.add_generation_prompt, self.variables, self.continue_final_message
        )


def chat_prompt(
    template: ChatTemplate | None,
    messages: Sequence[Any],
    *,
    definitions: list[dict[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    documents: list[Any] | None = None,
    reasoning_effort: str | None = None,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool = False,
    max_messages: int | None = None,
) -> ChatPrompt:
    """Fields by the names clients have for them; ``definitions`` are `tool_definitions`.

    ``add_generation_prompt=None``: unless ``continue_final_message``, the prompt ends with the assistant's turn begun.
    Raises `InvalidRequest` naming the field, also where the model has no template.
    """
    if template is None:
        raise InvalidRequest("this model has no chat template: send a prompt instead", field="messages")
    if definitions is not None and not template.writes_tools:
        raise bad("tools", "are not supported: this model's chat template does not write them")
    if not messages:
        raise bad("messages", "must not be empty")
    if max_messages is not None and len(messages) > max_messages:
        raise bad("messages", f"must have at most {max_messages} entries, got {len(messages)}")
    if add_generation_prompt and continue_final_message:
        raise bad("continue_final_message", "and add_generation_prompt cannot both be true")
    add = not continue_final_message if add_generation_prompt is None else add_generation_prompt
    checked = conversation(messages, template)
    if continue_final_message and checked[-1]["role"] != "assistant":
        raise bad("continue_final_message", "needs a last message of role assistant")
    variables = _variables(template, chat_template_kwargs, documents, reasoning_effort)
    if definitions is not None:
        variables["tools"] = definitions
    return ChatPrompt(template, checked, variables, add, continue_final_message)


def tool_definitions(tools: list[Any] | None, limits: ToolLimits | None = None) -> list[dict[str, Any]] | None:
    """The tools of a request, checked, each as `definition` has it; None for none."""
    return [definition(tool) for tool in tools or ()] if validate_tools(tools, limits) else None


def definition(tool: Mapping[str, Any]) -> dict[str, Any]:
    """As a template gets it: as it came, but for what is not the model's business."""
    function = tool.get("function", tool)
    shown = {name: value for name, value in function.items() if name not in ("type", "strict", *_MARKS)}
    return {"type": "function", "function": shown}


def _variables(
    template: ChatTemplate,
    kwargs: Mapping[str, Any] | None,
    documents: list[Any] | None,
    reasoning_effort: str | None,
) -> dict[str, Any]:
    """What the template is told beside messages and tools. A name nobody reads is refused: it would change nothing."""
    if len(kwargs or {}) > _MAX_VARIABLES:
        raise bad("chat_template_kwargs", f"must have at most {_MAX_VARIABLES} entries, got {len(kwargs or {})}")
    result: dict[str, Any] = {}
    for name, value in (kwargs or {}).items():
        if not template.reads(name) and name not in _COMMON_VARIABLES:
            raise InvalidRequest(
                f"chat_template_kwargs.{name[:60]} is not a variable of this model's chat template",
                field="chat_template_kwargs",
            )
        result[name] = value
    if reasoning_effort is not None:
        result.setdefault("reasoning_effort", label(reasoning_effort, "reasoning_effort"))
    if documents is not None:
        if not all(isinstance(document, dict) for document in documents):
            raise bad("documents", "must be a list of objects")
        result["documents"] = documents
    return result
