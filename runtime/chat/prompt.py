"""From a conversation to its prompt's text: the same for clients of the server and in process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InvalidRequest
from .conversation import ChatTurn, Conversation, OfferedTool
from .messages import template_messages
from .openai_messages import label
from .template import ChatTemplate

# Variables that many clients send to any model. Templates that do not read them ignore them.
_COMMON_VARIABLES = frozenset(
    {"enable_thinking", "thinking", "thinking_budget", "preserve_thinking", "reasoning_effort", "date_string"}
)
_MAX_VARIABLES = 64


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A checked conversation and the further variables of its template."""

    template: ChatTemplate
    turns: Sequence[ChatTurn]
    tools: Sequence[OfferedTool]
    variables: dict[str, Any]
    add_generation_prompt: bool
    continue_final_message: bool
    parse_special: bool = False

    def text(self, turns: Sequence[ChatTurn] | None = None, definitions: Sequence[dict[str, Any]] | None = None) -> str:
        """The prompt with its special tokens spelled out, and guards in ordinary text that spells one.

        Pass it to `Tokenizer.encode` without adding special tokens.

        ``turns`` and ``definitions`` replace the conversation's own, to see what they change. Raises `InvalidRequest`
        where the template refuses the conversation.
        """
        messages = template_messages(
            self.turns if turns is None else turns, self.template, continue_final=self.continue_final_message
        )
        if definitions is None:
            definitions = [tool.definition for tool in self.tools]
        if definitions and self.template.probes.reads_flat_tools:
            definitions = [definition.get("function", definition) for definition in definitions]
        variables = self.variables | ({"tools": definitions} if definitions else {})
        if not self.parse_special:
            special = self.template.special_text
            messages, variables = [special.guard_message(message) for message in messages], special.guard(variables)
        return self.template.render(messages, self.add_generation_prompt, variables, self.continue_final_message)


def chat_prompt(template: ChatTemplate, conversation: Conversation) -> ChatPrompt:
    """Raises `InvalidRequest` naming the field."""
    if conversation.tools:
        template = template.for_tools
    if conversation.tools and not template.writes_tools:
        raise InvalidRequest("tools", "are not supported: this model's chat template does not write them")
    continued = conversation.continue_final_message
    if conversation.add_generation_prompt and continued:
        raise InvalidRequest("continue_final_message", "and {0} cannot both be true", others=("add_generation_prompt",))
    add = not continued if conversation.add_generation_prompt is None else conversation.add_generation_prompt
    if continued and conversation.turns[-1].role != "assistant":
        raise InvalidRequest("continue_final_message", "needs a last message of role assistant")
    variables = _variables(template, conversation)
    parse_special = conversation.parse_special
    return ChatPrompt(template, conversation.turns, conversation.tools, variables, add, continued, parse_special)


def _variables(template: ChatTemplate, conversation: Conversation) -> dict[str, Any]:
    """Template variables beside messages and tools. Names that the template does not read are refused."""
    kwargs: Mapping[str, Any] = conversation.chat_template_kwargs or {}
    if len(kwargs) > _MAX_VARIABLES:
        raise InvalidRequest("chat_template_kwargs", f"must have at most {_MAX_VARIABLES} entries, got {len(kwargs)}")
    result: dict[str, Any] = {}
    for name, value in kwargs.items():
        if not template.reads(name) and name not in _COMMON_VARIABLES:
            raise InvalidRequest(f"chat_template_kwargs.{name[:60]}", "is not a variable of this model's chat template")
        result[name] = value
    if conversation.reasoning_effort is not None:
        result.setdefault("reasoning_effort", label(conversation.reasoning_effort, "reasoning_effort"))
    if conversation.documents is not None:
        if not all(isinstance(document, dict) for document in conversation.documents):
            raise InvalidRequest("documents", "must be a list of objects")
        result["documents"] = conversation.documents
    return result
