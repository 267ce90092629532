"""The logprobs of what is in a message, of a model that also thinks and calls."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from .....logprobs import TokenLogprob
from ..chat.places import TokenPlaces

Rows = list[dict[str, Any]]


class TextLogprobs:
    """`add` those of all tokens, read the text with `through`."""

    def __init__(self, places: TokenPlaces, describe: Callable[[TokenLogprob], dict[str, Any]]) -> None:
        self._places = places
        self._describe = describe
        self._waiting: deque[TokenLogprob] = deque()

    def add(self, rows: Iterable[TokenLogprob]) -> None:
        for row in rows:
            self._places.add((row.token,))
            self._waiting.append(row)

    def through(self, text: str) -> Rows:
        """Of the tokens that begin in ``text``, which goes on where the last one ended."""
        return [self._describe(self._waiting.popleft()) for _ in range(self._places.through(text))]

    def rest(self) -> Rows:
        """Of the tokens after all text: those of a stop string, for one."""
        found = [self._describe(row) for row in self._waiting]
        self._waiting.clear()
        return found
