"""The model's own chat template, one turn at a time.

A template renders whole conversations, but a state only grows. So a conversation is rendered with a mark in place of
each turn's content; the text between two marks is what the template writes between two turns. Content never passes
through the template, so it cannot imitate the template's own text, and generated tokens stay as they are.

What a template would rewrite in earlier turns once a new one follows (Qwen 3 drops earlier reasoning) stays as it was:
a prompt that changes could not be cached. A template that moves or drops a turn's content is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ...runtime.errors import InvalidRequest
from ..errors import BackendError

if TYPE_CHECKING:
    from ...runtime.chat.template import ChatTemplate

_OPEN, _CLOSE = "\ue000", "\ue001"  # private use characters: no template strips or splits at them


class TurnTemplate:
    """Renders the text before, between and after the contents of a conversation's turns."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._between = lru_cache(maxsize=4096)(self._render)
        self._strips: dict[str, bool] = {}

    @property
    def writes_tools(self) -> bool:
        return self._template.writes_tools

    def between(self, roles: tuple[str, ...], generate: bool, variables: TemplateVariables) -> tuple[str, ...]:
        """``len(roles) + 1`` texts: before each content, and after the last one. ``generate``: with the start of the
        assistant's turn.

        Raises `BackendError` if the template refuses the roles or does not write each content once and in order.
        """
        return self._between(roles, generate, variables)

    def settled(self, roles: tuple[str, ...], variables: TemplateVariables) -> int:
        """The number of turns whose text does not change, whichever role is next."""
        try:
            now = self.between(roles, False, variables)
        except BackendError:
            return 0
        count = 0
        for after in ("user", "assistant"):
            try:
                then = self.between((*roles, after), False, variables)
            except BackendError:
                continue  # the template refuses such a conversation
            same = next((i for i in range(len(roles)) if now[i] != then[i]), len(roles))
            count = min(count, same) if count else same
            if not same:
                return 0
        return count

    def strips(self, role: str) -> bool:
        """Whether the template strips white space around this role's content, as Llama 3's and Gemma's do."""
        if role not in self._strips:
            before = {"assistant": ({"role": "user", "content": "x"},)}.get(role, ())
            text = self._write([*before, {"role": role, "content": f" {_OPEN}{_CLOSE} "}], False, NO_VARIABLES)
            self._strips[role] = f" {_OPEN}{_CLOSE} " not in text
        return self._strips[role]

    def _render(self, roles: tuple[str, ...], generate: bool, variables: TemplateVariables) -> tuple[str, ...]:
        messages = [{"role": role, "content": f"{_OPEN}{i}{_CLOSE}"} for i, role in enumerate(roles)]
        rest = self._write(messages, generate, variables)
        found = []
        for i, role in enumerate(roles):
            mark = f"{_OPEN}{i}{_CLOSE}"
            before, met, rest = rest.partition(mark)
            if not met or mark in rest or _OPEN in before:
                raise BackendError(
                    f"the model's chat template cannot be written turn by turn: it drops, repeats or moves the content "
                    f"of turn {i + 1} ({role}) of {len(roles)}"
                )
            found.append(before)
        return (*found, rest)

    def _write(self, messages: Sequence[Mapping[str, Any]], generate: bool, variables: TemplateVariables) -> str:
        try:
            return self._template.render(messages, generate, {"strftime_now": _today, **variables.values})
        except InvalidRequest as error:
            raise BackendError(error.message) from error


def _today(format: str) -> str:
    """The time for a template's ``strftime_now``, cut to the day: a prompt with the time of day could not be shared."""
    from datetime import datetime

    return datetime.now().replace(hour=0, minute=0, second=0, microsecond=0).strftime(format)


class TemplateVariables:
    """Template inputs beside the messages (``tools``). Hashable, since renderings are memoized."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = dict(values)
        self._key = repr(sorted(self.values.items()))

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TemplateVariables) and self._key == other._key


NO_VARIABLES = TemplateVariables({})
