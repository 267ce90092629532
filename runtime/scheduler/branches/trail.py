"""A branch's tokens: immutable pieces that branches share, so that a fork copies none of them."""

from __future__ import annotations

import numpy as np

from ...step import Int32

_MAX_DEPTH = 64  # pieces in a row before they are joined: bounds the walk, and what each piece costs beyond its tokens


class Trail:
    """Tokens int32 [length], as a last ``piece`` after a ``parent``. Nothing in it ever changes."""

    __slots__ = ("_depth", "_parent", "_piece", "length")

    def __init__(self, piece: Int32, parent: Trail | None = None) -> None:
        self._piece = piece
        self._parent = parent
        self._depth: int = 1 if parent is None else parent._depth + 1
        self.length: int = len(piece) + (0 if parent is None else parent.length)

    def then(self, piece: Int32) -> Trail:
        """This and ``piece`` after it. This one stays as it is."""
        if not len(piece):
            return self
        if not self.length:
            return Trail(piece)
        if self._depth >= _MAX_DEPTH:
            return Trail(self.tokens(piece))
        return Trail(piece, self)

    def tokens(self, more: Int32 | None = None) -> Int32:
        """All of them [length], and ``more`` after them, as one new array."""
        pieces = [] if more is None else [more]
        trail: Trail | None = self
        while trail is not None:
            pieces.append(trail._piece)
            trail = trail._parent
        return np.concatenate(pieces[::-1])


EMPTY = Trail(np.empty(0, np.int32))
