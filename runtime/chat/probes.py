"""Detects the capabilities of a chat template by rendering small conversations with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

from ..errors import InvalidRequest

_ID = "branchwis"  # some templates require call ids of nine characters
_USER = {"role": "user", "content": "x"}


class Renderer(Protocol):
    """What is probed: a `ChatTemplate`."""

    source: str

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, variables: Mapping[str, Any]
    ) -> str: ...


class TemplateProbes:
    """Each answer is computed once."""

    def __init__(self, template: Renderer) -> None:
        self._template = template
        self._separators: dict[str, str | None] = {}  # by role
        self._accepted: dict[tuple[str, ...], bool] = {}

    @cached_property
    def knows_developer(self) -> bool:
        """Whether the template handles the role ``developer``; most know only ``system``."""
        return "developer" in self._template.source

    @cached_property
    def keeps_arguments(self) -> bool:
        """Whether the template writes a tool call's arguments verbatim if they are text.

        The prompt then repeats exactly the tokens that the model generated. An object is serialised again, in the
        template's own way.
        """
        written = '{"branchwise":   [1,2]}'
        result = {"role": "tool", "content": "y", "tool_call_id": _ID, "name": "probe"}
        text = self._rendered([_USER, _calling(written), result])
        return written in text and f"{{{written}}}" not in text  # Gemma 4 writes braces of its own around any text

    @cached_property
    def reads_flat_tools(self) -> bool:
        """Whether the template reads a function alone, and not in the object that chat completions put around it."""
        function = {"name": "branchwise-probe", "description": "", "parameters": {"type": "object", "properties": {}}}
        shapes: list[dict[str, Any]] = [{"type": "function", "function": function}, function]
        return ["branchwise-probe" in self._rendered([_USER], tools=[shape]) for shape in shapes] == [False, True]

    @cached_property
    def takes_thinking_beside_text(self) -> bool:
        """Whether a turn with calls may have both thinking and text. GPT-OSS's template refuses that."""
        turn = _calling("{}") | {"content": "x"}
        return bool(self._rendered([_USER, turn | {"reasoning_content": "y"}]) or not self._rendered([_USER, turn]))

    @cached_property
    def writes_all_calls(self) -> bool:
        """Whether the template writes every call of a turn. GPT-OSS's writes the first, Llama 3's refuses a second."""
        arguments: str | dict[str, Any] = "{}" if self.keeps_arguments else {}
        one, two = (_calling(arguments, name) for name in ("branchwise-first", "branchwise-second"))
        both = self._rendered([_USER, one | {"tool_calls": one["tool_calls"] + two["tool_calls"]}])
        return "branchwise-second" in both or "branchwise-first" not in self._rendered([_USER, one])

    @property
    def accepts_late_system(self) -> bool:
        """Whether a system message may follow any other. Checked twice: some templates only count turns."""
        return self.accepts("user", "assistant", "system") and self.accepts("user", "assistant", "user", "system")

    def accepts(self, *roles: str) -> bool:
        """Whether the template writes the contents of messages with these roles, all and in order."""
        if roles not in self._accepted:
            contents = [f"branchwise-{i}-" for i in range(len(roles))]
            pairs = zip(roles, contents, strict=True)
            text = self._rendered([{"role": role, "content": content} for role, content in pairs])
            places = [text.find(content) for content in contents]
            self._accepted[roles] = -1 not in places and places == sorted(places)
        return self._accepted[roles]

    def reads_parts(self, role: str) -> bool:
        """Whether the template writes a content that is a list of text parts, in a message of ``role``."""
        return self._between_parts(role) is not None

    def part_separator(self, role: str) -> str:
        """The separator of text parts that become one string: the template's own, else a newline."""
        return next((found for name in (role, "user") if (found := self._between_parts(name)) is not None), "\n")

    def _between_parts(self, role: str) -> str | None:
        """What the template writes between two text parts; None where it cannot read a list of them."""
        if role not in self._separators:
            first, second = "branchwise-first", "branchwise-second"
            asked = {"role": role, "content": [{"type": "text", "text": first}, {"type": "text", "text": second}]}
            if role == "tool":
                asked |= {"tool_call_id": _ID, "name": "probe"}
            before = {"assistant": [_USER], "tool": [_USER, _calling("{}")]}.get(role, [])
            text = self._rendered([*before, asked, *([] if role in ("user", "tool") else [_USER])])
            between = text.partition(first)[2].partition(second)
            # A template that prints the list itself writes dicts, with quoted keys.
            found = between[1] and '"' not in between[0] and "'" not in between[0]
            self._separators[role] = between[0] if found else None
        return self._separators[role]

    def _rendered(self, messages: Sequence[dict[str, Any]], **variables: Any) -> str:
        """Empty where the template refuses the messages."""
        try:
            return self._template.render(messages, False, variables)
        except InvalidRequest:
            return ""


def _calling(arguments: str | dict[str, Any], name: str = "probe") -> dict[str, Any]:
    call = {"type": "function", "id": _ID, "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}
