"""Token sequences that share their prefixes: the prompts of branches and of program states."""

from __future__ import annotations

import numpy as np

from .step import Int32

# Pieces in a chain before they are joined into one. Bounds the walk of `array` and the memory that each small piece
# needs beyond its tokens.
_MAX_DEPTH = 64


class SharedTokens:
    """An immutable sequence of token ids, int32 [length]: a parent sequence and a last piece.

    A fork shares the object itself. `extended` returns a new sequence that refers to this one, so a fork and an append
    cost O(1) and O(piece) rather than O(length).
    """

    __slots__ = ("_depth", "_parent", "_piece", "length")

    def __init__(self, piece: Int32, parent: SharedTokens | None = None) -> None:
        self._piece = piece
        self._parent = parent
        self._depth: int = 1 if parent is None else parent._depth + 1
        self.length: int = len(piece) + (0 if parent is None else parent.length)

    def extended(self, piece: Int32) -> SharedTokens:
        """A sequence of this one's tokens and then ``piece`` (int32 [n], not copied)."""
        if not len(piece):
            return self
        if not self.length:
            return SharedTokens(piece)
        if self._depth >= _MAX_DEPTH:
            return SharedTokens(self.array(piece))
        return SharedTokens(piece, self)

    def array(self, more: Int32 | None = None) -> Int32:
        """All tokens, and ``more`` after them, as one new array, int32 [length + len(more)]."""
        pieces = [] if more is None else [more]
        node: SharedTokens | None = self
        while node is not None:
            pieces.append(node._piece)
            node = node._parent
        return np.concatenate(pieces[::-1])

    def last(self, n: int) -> Int32:
        """The last ``n`` tokens, or all if there are fewer. Visits only the pieces that hold them."""
        pieces: list[Int32] = []
        node: SharedTokens | None = self
        while node is not None and n > 0:
            pieces.append(node._piece[-n:])
            n -= len(node._piece)
            node = node._parent
        return np.concatenate(pieces[::-1]) if pieces else EMPTY.array()


EMPTY = SharedTokens(np.empty(0, np.int32))
