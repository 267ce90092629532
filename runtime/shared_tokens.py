"""Token sequences that share their prefixes (the prompts of branches and of program states), and their bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .step import Int32  # it imports what a client need not have installed


class SharedTokens:
    """An immutable sequence of token ids, int32 [length]: a parent sequence and a last piece.

    A fork shares the object itself; `extended` returns a new sequence that refers to this one. Each piece is more than
    twice as long as the next, so a sequence has at most log2(length) + 1 pieces.
    """

    __slots__ = ("_parent", "_piece", "length")

    def __init__(self, piece: Int32, parent: SharedTokens | None = None) -> None:
        self._piece = piece
        self._parent = parent
        self.length: int = len(piece) + (0 if parent is None else parent.length)

    def extended(self, piece: Int32) -> SharedTokens:
        """A sequence of this one's tokens and then ``piece``, int32 [n]."""
        if not len(piece):
            return self
        parent: SharedTokens | None = self
        pieces, total = [piece], len(piece)
        while parent is not None and len(parent._piece) <= 2 * total:
            pieces.append(parent._piece)
            total += len(parent._piece)
            parent = parent._parent
        return SharedTokens(piece if len(pieces) == 1 else np.concatenate(pieces[::-1]), parent)

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


def tokens_to_bytes(tokens: Int32) -> bytes:
    """Token ids as messages hold them: int32, little-endian."""
    return tokens.astype("<i4", copy=False).tobytes()


def tokens_from_bytes(data: bytes) -> Int32:
    return np.frombuffer(data, dtype="<i4").astype(np.int32, copy=False)
