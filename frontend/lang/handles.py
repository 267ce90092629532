"""Handles of the backends that take token ids. Apart from them, because this needs NumPy and `connect` does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ...runtime.shared_tokens import EMPTY, SharedTokens

if TYPE_CHECKING:
    from ...runtime.step import Int32


class Prompt:
    """A prompt of token ids. Forks share their tokens."""

    __slots__ = ("tokens",)

    def __init__(self, tokens: SharedTokens = EMPTY) -> None:
        self.tokens = tokens

    @property
    def length(self) -> int:
        return self.tokens.length

    def array(self, more: Sequence[int] = ()) -> Int32:
        """The prompt and ``more`` after it, int32 [length + len(more)]."""
        return self.tokens.array(np.array(more, np.int32) if more else None)

    def extend(self, ids: Sequence[int]) -> None:
        self.tokens = self.tokens.extended(np.array(ids, np.int32))

    def fork(self) -> Prompt:
        return Prompt(self.tokens)


class BranchHandle(Prompt):
    """A prompt and the server's branch of it: ``id`` (None: there is none) and the tokens that branch still lacks."""

    __slots__ = ("id", "unsent")

    def __init__(self, tokens: SharedTokens = EMPTY, id: str | None = None) -> None:
        super().__init__(tokens)
        self.id = id
        self.unsent: list[int] = []

    def fork(self, id: str | None = None) -> BranchHandle:
        return BranchHandle(self.tokens, id)
