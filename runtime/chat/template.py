"""A model's own chat template, which renders a conversation to the prompt's text. Clients cannot send templates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..errors import InvalidRequest, LoadError
from .probes import TemplateProbes
from .special_text import SpecialText

if TYPE_CHECKING:
    from jinja2 import Template

    from .sandbox import Sandbox

RENDER_SECONDS = 5.0
MAX_CHARACTERS = 16 * 1024 * 1024  # of one rendering
MAX_REASON = 300  # characters of a template's own error message

# Names that a request's variables may not have: the conversation's parts, and what the sandbox provides.
RESERVED = frozenset(
    {
        *("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize"),
        *("raise_exception", "strftime_now", "namespace", "dict", "range", "cycler", "joiner"),
    }
)
_REASONING = (
    "reasoning_content",
    "thinking",
    "reasoning",
    "tool_plan",
)  # names that templates have for a message's reasoning
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "  # with a space at its end, which says whether the template trims


class ChatTemplate:
    """Renders conversations. Compiled on first use: servers without chat requests never import Jinja."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        tool_source: str | None = None,
        special_text: SpecialText | None = None,
    ) -> None:
        """``special_tokens``: named ones that templates may write; ``special_text``: all of the tokenizer's."""
        self.source = source
        self.special_text = special_text or SpecialText(special_tokens.values())
        self.tool_source = tool_source
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
        continue_final_message: bool = False,
        seconds: float = RENDER_SECONDS,
    ) -> str:
        """The prompt's text. ``variables``: further names that the template may read, such as ``tools``.

        ``continue_final_message``: the text ends with the last message's content, for the model to continue.
        Equal to transformers' ``apply_chat_template``. Raises `InvalidRequest` if the template raises an
        error or takes longer than ``seconds``; `LoadError` if it is not a valid template.
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
            raise InvalidRequest(
                "messages", f"could not be rendered: the chat template was stopped: {error}"
            ) from error
        except Exception as error:  # a template can raise whatever an expression can
            raise InvalidRequest("messages", f"were refused by the chat template: {str(error)[:MAX_REASON]}") from error
        return _up_to_tag(text, messages[-1]["content"]) if continue_final_message else text

    def reads(self, name: str) -> bool:
        """Whether the template reads a variable of this name. Special tokens and `RESERVED` names do not count."""
        return name not in RESERVED and name not in self._special_tokens and name in self._compiled[2]

    @property
    def writes_tools(self) -> bool:
        return "tools" in self._compiled[2]

    @cached_property
    def for_tools(self) -> ChatTemplate:
        """The template of requests with tools: the checkpoint's ``tool_use`` if it has one, as in transformers."""
        return (
            self
            if self.tool_source is None
            else ChatTemplate(self.tool_source, self._special_tokens, special_text=self.special_text)
        )

    @cached_property
    def probes(self) -> TemplateProbes:
        return TemplateProbes(self)

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
    """Gives a message's reasoning every name that the template may look for."""
    reasoning = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return (
        dict(message)
        if reasoning is None
        else {**dict.fromkeys(_REASONING, reasoning), **message, "reasoning_content": reasoning}
    )


def _tag(conversation: list[dict[str, Any]]) -> None:
    if not conversation or not isinstance(conversation[-1].get("content"), str):
        raise InvalidRequest("continue_final_message", "needs a last message with text to continue")
    conversation[-1]["content"] += _TAG


def _up_to_tag(text: str, final: str) -> str:
    at = text.rfind(_TAG.strip())
    if at < 0 or final.strip() not in text:
        raise InvalidRequest(
            "continue_final_message", "is not possible: the chat template does not write the last message unchanged"
        )
    return text[:at] if text.startswith(_TAG, at) else text[:at].rstrip()
