"""A model's own chat template, which renders a conversation to the prompt's text. Clients cannot send templates."""

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
MAX_REASON = 300  # characters of a template's own error message

# Names that a request's variables may not have: the conversation's parts, and what the sandbox provides.
RESERVED = frozenset(
    {
        *("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize"),
        *("raise_exception", "strftime_now", "namespace", "dict", "range", "cycler", "joiner"),
    }
)
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names that templates have for a message's reasoning
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "  # with a space at its end, which says whether the template trims


class ChatTemplate:
    """Renders conversations. Compiled on first use: servers without chat requests never import Jinja."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._separators: dict[str, str | None] = {}  # by role: see `_between_parts`

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
    def knows_developer(self) -> bool:
        """Whether the template handles the role ``developer``; most know only ``system``."""
        return "developer" in self.source

    @cached_property
    def keeps_arguments(self) -> bool:
        """Whether the template writes a tool call's arguments verbatim if they are text.

        The prompt then repeats exactly the tokens that the model generated. An object is serialised again, in the
        template's own way.
        """
        written = '{"branchwise":   [1,2]}'
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "", "tool_calls": [_probe_call(written)]},
            {"role": "tool", "content": "y", "tool_call_id": _PROBE_ID, "name": "probe"},
        ]
        try:
            return written in self.render(messages, False, {})
        except InvalidRequest:
            return False

    def reads_parts(self, role: str) -> bool:
        """Whether the template writes a content that is a list of text parts, in a message of ``role``."""
        return self._between_parts(role) is not None

    def part_separator(self, role: str) -> str:
        """What joins text parts that become one string: what the template writes between them, else a newline."""
        return next((found for name in (role, "user") if (found := self._between_parts(name)) is not None), "\n")

    def _between_parts(self, role: str) -> str | None:
        """What the template writes between two text parts; None where it cannot read a list of them."""
        if role not in self._separators:
            self._separators[role] = self._probe_parts(role)
        return self._separators[role]

    def _probe_parts(self, role: str) -> str | None:
        first, second = "branchwise-first", "branchwise-second"
        user = {"role": "user", "content": "x"}
        asked = {"role": role, "content": [{"type": "text", "text": first}, {"type": "text", "text": second}]}
        before: list[dict[str, Any]] = [user] if role == "assistant" else []
        if role == "tool":
            before = [user, {"role": "assistant", "content": "", "tool_calls": [_probe_call("{}")]}]
            asked |= {"tool_call_id": _PROBE_ID, "name": "probe"}
        after = [] if role in ("user", "tool") else [user]
        try:
            text = self.render([*before, asked, *after], False, {})
        except InvalidRequest:
            return None
        between = text.partition(first)[2].partition(second)
        # Printing the list itself writes the dicts, with quoted keys.
        return between[0] if between[1] and '"' not in between[0] and "'" not in between[0] else None

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


_PROBE_ID = "branchwis"  # some templates want nine characters


def _probe_call(arguments: str) -> dict[str, Any]:
    return {"type": "function", "id": _PROBE_ID, "function": {"name": "probe", "arguments": arguments}}


def _with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """Gives a message's reasoning every name that the template may look for."""
    reasoning = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return dict(message) if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


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
