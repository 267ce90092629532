"""Keeps text that spells a special token as text, so that no client can end its turn and begin another role's.

Chat templates write special tokens as text, and the tokenizer turns them into tokens. Text from clients goes through
the template with a guard character after each character of such a spelling, so no special token is left in it; the
tokenizer removes the guards and encodes the spelling as ordinary text. Text without such spellings is not touched.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

GUARD = "\ufdd0"  # a Unicode noncharacter: never part of text that is interchanged


class GuardedPiece(NamedTuple):
    """A piece of a guarded text. ``end``: its end in the guarded text, in characters. ``literal``: ordinary text that
    spells a special token, without its guards."""

    text: str
    end: int
    literal: bool


class SpecialText:
    """``names``: the special tokens of a tokenizer, as text."""

    def __init__(self, names: Iterable[str]) -> None:
        ordered = sorted((name for name in names if name), key=len, reverse=True)  # the longest match counts
        self._spelled = _any_of(ordered)
        self._guarded = _any_of([_guarded(name) for name in ordered])

    def first_in(self, text: str) -> str | None:
        """The first special token that ``text`` spells, if any."""
        found = self._spelled.search(text)
        return None if found is None else found[0]

    def guard(self, value: Any) -> Any:
        """A JSON value with all of its strings guarded; the value itself where none spells a special token."""
        match value:
            case str():
                return self._spelled.sub(lambda found: _guarded(found[0]), value)
            case list():
                return [self.guard(item) for item in value]
            case dict():
                return {self.guard(name): self.guard(item) for name, item in value.items()}
        return value

    def guard_message(self, message: dict[str, Any]) -> dict[str, Any]:
        """A template's message. Text parts that spell a special token together become one text."""
        parts = message.get("content")
        if isinstance(parts, list):
            texts = [part["text"] for part in parts]
            spelled = sum(len(self._spelled.findall(text)) for text in texts)
            if len(self._spelled.findall("".join(texts))) > spelled:
                message = {**message, "content": "".join(texts)}
        guarded: dict[str, Any] = self.guard({name: value for name, value in message.items() if name != "role"})
        return {"role": message["role"], **guarded}

    def pieces(self, text: str) -> Iterator[GuardedPiece]:
        """Of a guarded text, in order; empty ones are left out."""
        at = 0
        for found in self._guarded.finditer(text):
            if found.start() > at:
                yield GuardedPiece(text[at : found.start()], found.start(), False)
            yield GuardedPiece(found[0].replace(GUARD, ""), found.end(), True)
            at = found.end()
        if at < len(text):
            yield GuardedPiece(text[at:], len(text), False)


def _guarded(name: str) -> str:
    return GUARD.join(name) + GUARD


def _any_of(names: list[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, names)) or r"(?!)")
