"""A model's own chat template: from a conversation to the prompt's text. Clients never send templates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..errors import InvalidRequest, LoadError

if TYPE_CHECKING:
    from jinja2 import Template

    from .sandbox import Sandbox

RENDER_SECONDS = 5.0
MAX_CHARACTERS = 16 * 1024 * 1024  # of one rendering
MAX_REASON = 300  # characters of what a template says when it refuses

# What a request's variables may not be called: what the conversation is made of, and what the sandbox provides.
RESERVED = frozenset(
    {
        *("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize"),
        *("raise_exception", "strftime_now", "namespace", "dict", "range", "cycler", "joiner"),
    }
)
_REASONING = ("reasoning_content", "thinking", "reasoning")  # what models' templates call a message's reasoning
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "  # with a space at its end, which says whether the template trims


class ChatTemplate:
    """Renders conversations. Compiled when first used, so a server that is never asked to chat pays nothing."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
        continue_final_message: bool = False,
        seconds: float = RENDER_SECONDS,
    ) -> str:
        """The prompt's text; ``variables`` are extra names the template may use (such as ``tools``).

        ``continue_final_message``: the text ends where the last message's content does, for the model to go on with it.
        Equal to transformers' ``apply_chat_template``. Raises `InvalidRequest` if the template refuses or cannot cope
        with the messages, or takes longer than ``seconds``; `LoadError` if it is not a valid template.
        """
        from .sandbox import Budget, Exhausted

        sandbox, template, _ = self._compiled
        conversation = [_with_reasoning(message) for message in messages]
        if continue_final_message:
            _tag(conversation)
        names = {"tools": None, "documents": None, **self._special_tokens, **variables}
        names |= {"messages": conversation, "add_generation_prompt": add_generation_prompt}
        try:
            text = sandbox.run(template, names, Budget(seconds, MAX_CHARACTERS))
        except Exhausted as error:
            raise InvalidRequest(f"the chat template was stopped: {error}", field="messages") from error
        except Exception as error:  # a template can raise whatever an expression can
            raise InvalidRequest(
                f"the chat template refused the messages: {str(error)[:MAX_REASON]}", field="messages"
            ) from error
        return _up_to_tag(text, messages[-1]["content"]) if continue_final_message else text

    def reads(self, name: str) -> bool:
        """Whether the template looks at a variable of this name. Special tokens and `RESERVED` names do not count."""
        return name not in RESERVED and name not in self._special_tokens and name in self._compiled[2]

    @property
    def writes_tools(self) -> bool:
        return "tools" in self._compiled[2]

    @cached_property
    def knows_developer(self) -> bool:
        """Whether the template has anything to say about the role ``developer``; most call it ``system``."""
        return "developer" in self.source

    @cached_property
    def keeps_arguments(self) -> bool:
        """Whether a tool call's arguments may be handed over as the text the model wrote, and are written as such.

        The prompt then continues with the very tokens the model generated; an object is written anew, in the
        template's way.
        """
        written = '{"branchwise":   [1,2]}'
        call = {"type": "function", "id": "branchwis", "function": {"name": "probe", "arguments": written}}
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "y", "tool_call_id": "branchwis", "name": "probe"},
        ]
        try:
            return written in self.render(messages, False, {})
        except InvalidRequest:
            return False

    @cached_property
    def _compiled(self) -> tuple[Sandbox, Template, frozenset[str]]:
        from jinja2 import TemplateSyntaxError

        from .sandbox import Sandbox

        sandbox = Sandbox()
        try:
            template, names = sandbox.compiled(self.source)
        except TemplateSyntaxError as error:
            raise LoadError(f"the model's chat template is not valid: line {error.lineno}: {error.message}") from error
        return sandbox, template, names


def _with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """Templates call it by several names: it is given all that this one may look for."""
    reasoning = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return dict(message) if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _tag(conversation: list[dict[str, Any]]) -> None:
    if not conversation or not isinstance(conversation[-1].get("content"), str):
        raise InvalidRequest("continue_final_message needs a last message with text to continue", field="messages")
    conversation[-1]["content"] += _TAG


def _up_to_tag(text: str, final: str) -> str:
    at = text.rfind(_TAG.strip())
    if at < 0 or final.strip() not in text:
        raise InvalidRequest(
            "the chat template does not write the last message as it is, so it cannot be continued", field="messages"
        )
    return text[:at] if text.startswith(_TAG, at) else text[:at].rstrip()
